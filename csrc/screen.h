// Greedy decoding that reads an int8 copy of a bf16 or f32 head, and only a few rows of the head itself, and yet finds
// the very token that the whole head would.
//
// With Q_i = scale_i * codes of row W_i, and x^ the two-term int8 split of the state x,
//     |W_i . x - Q_i . x^|  <=  ||W_i - Q_i|| ||x^|| + ||W_i|| ||x - x^||,
// and the head's kernel, whose sums of n products round, stays within gamma_n ||W_i|| ||x|| of W_i . x (Higham,
// Accuracy and Stability of Numerical Algorithms, 3.1). Rows that these bounds cannot rule out are scored by the head's
// kernel.
#pragma once

#include <vector>

#include "decoder.h"

namespace bitdistill {

class Screen {
 public:
  // Throws std::invalid_argument where the head is not in f32 or bf16.
  Screen(const KernelTable& room, const DenseMatrix& head, ThreadPool& pool);

  uint64_t bytes() const { return codes_.bytes() + 3 * scale_.bytes(); }

  // What one sequence needs while its head is screened.
  struct Pass {
    struct alignas(64) Share {
      double floor;  // no lower than this is the best logit, as far as one worker knows
      float best;
      int32_t token;
      uint64_t rescored;
    };
    Pass(size_t rows, size_t workers) : ceiling(rows), shares(workers) {}
    Array<float> ceiling;  // of each row: its logit is no higher
    std::vector<Share> shares;
    uint64_t tokens = 0, rescored = 0;
  };

  // The lowest index of the highest logit of x[hidden_size], the same on every worker, or -1 where nothing can be
  // proven (numbers that are not finite). Every worker calls it; begins and ends with a barrier.
  int32_t best(const float* x, Pass& pass, Worker& worker) const;

 private:
  const KernelTable& room_;
  const DenseMatrix& head_;
  Array<int8_t> codes_;  // [rows][columns]
  Array<float> scale_, norm_, error_norm_;
};

}  // namespace bitdistill
