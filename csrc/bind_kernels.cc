// Single kernels on arrays, for tests and measurements. Everything a kernel relies on is checked here.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <cmath>
#include <cstring>
#include <stdexcept>

#include "bind_arrays.h"
#include "decoder.h"
#include "dispatch.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace bitdistill {
namespace {

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

// A packed matrix in a room's order, from the file's.
struct Weights {
  Weights(const KernelTable& room, const ArrayIn<uint8_t, 4>& packed, size_t rows, size_t columns, size_t block_size) {
    require(rows >= 1 && columns >= 1 && columns <= kMaxFeatures, "rows and columns must be positive, columns <= 2^18");
    matrix.rows = rows;
    matrix.columns = columns;
    const CodeShape shape = code_shape(columns, block_size, room.group);
    matrix.segment = shape.segment;
    matrix.segments = shape.segments;
    matrix.groups = shape.padded / room.group;
    const size_t file_groups = ceil_div(shape.segment, kFileGroup);
    require(packed.shape(0) == matrix.row_blocks() && packed.shape(1) == shape.segments &&
                packed.shape(2) == file_groups && packed.shape(3) == kGroupBytes,
            "packed does not have the shape of this matrix");
    const size_t count = matrix.row_blocks() * shape.segments;
    bytes.resize(count * matrix.groups * kGroupBytes);
    if (room.repack == nullptr) {
      std::memcpy(bytes.data(), packed.data(), bytes.size());
    } else {
      for (size_t i = 0; i < count; ++i) {
        room.repack(packed.data() + i * file_groups * kGroupBytes, shape.segment,
                    bytes.data() + i * matrix.groups * kGroupBytes);
      }
    }
    matrix.data = bytes.data();
  }
  TernaryMatrix matrix;
  std::vector<uint8_t> bytes;
};

// Codes as quantize_token leaves them, with memory of exactly the size a kernel may touch.
struct Codes {
  Codes(const ArrayIn<int8_t, 2>& code, const CodeShape& shape, size_t tile) {
    const size_t tokens = code.shape(0), columns = code.shape(1), stride = shape.stride();
    rows.resize(tokens * stride);
    packed.resize(tokens * stride);
    sums.resize(shape.segments * tokens);
    for (size_t t = 0; t < tokens; ++t) {
      for (size_t k = 0; k < columns; ++k) {
        const int8_t value = code.data()[t * columns + k];
        rows[t * stride + k / shape.segment * shape.padded + k % shape.segment] = value;
        sums[k / shape.segment * tokens + t] += value;
      }
    }
    input = {.tokens = tokens,
             .tile = tile,
             .shape = shape,
             .code = rows.data(),
             .packed = packed.data(),
             .sums = sums.data(),
             .columns = columns};
    for (size_t first = 0; first < tokens; first += tile) pack_tile(first, input);
  }
  std::vector<int8_t> rows, packed;
  std::vector<int32_t> sums;
  Input input;
};

nb::object ternary_dot(const ArrayIn<uint8_t, 4>& packed, size_t rows, size_t columns, const ArrayIn<int8_t, 2>& code,
                       const std::string& isa, const std::string& kernel, size_t block_size) {
  const KernelTable& room = room_named(isa);
  require(code.shape(1) == columns && code.shape(0) >= 1, "code must have shape [M >= 1, columns]");
  require(kernel == "gemv" || kernel == "gemm" || kernel == "gemm_int4", "kernel must be gemv, gemm or gemm_int4");
  const Weights weights(room, packed, rows, columns, block_size);
  const TernaryMatrix& m = weights.matrix;
  const size_t tokens = code.shape(0), tile = tile_for(tokens, room.tile);
  const Codes codes(code, code_shape(columns, block_size, room.group), tile);
  const Input& in = codes.input;
  ArrayOut<int32_t> out({tokens, m.segments, rows});
  const auto keep = [&](size_t t, size_t s, size_t block, const int32_t* dot) {
    const size_t row = block * kRowBlock;
    std::copy(dot, dot + std::min(kRowBlock, rows - row), out.data() + (t * m.segments + s) * rows + row);
  };
  if (kernel == "gemm_int4") {
    require(room.gemm_int4 != nullptr && m.segments == 1,
            "this room, or a matrix of several segments, has no gemm_int4");
    for (const int8_t value : std::span(code.data(), code.size()))
      require(value >= -8 && value <= 7, "code must be within -8..7");
    std::vector<uint8_t> scratch(kLookupScratch);
    std::vector<int32_t> dots(tokens * kLookupBlocks * kRowBlock);
    for (size_t first = 0; first < m.row_blocks(); first += kLookupBlocks) {
      const size_t count = std::min(kLookupBlocks, m.row_blocks() - first), width = round_up(count, 2) * kRowBlock;
      room.gemm_int4(m.data + first * m.stride(), count, m.stride(), m.groups, in.code, in.shape.stride(), tokens,
                     scratch.data(), dots.data(), width);
      for (size_t t = 0; t < tokens; ++t) {
        for (size_t b = 0; b < count; ++b) keep(t, 0, first + b, dots.data() + t * width + b * kRowBlock);
      }
    }
    return out.cast();
  }
  for (size_t s = 0; s < m.segments; ++s) {
    const uint8_t* segment = m.data + s * m.groups * kGroupBytes;
    if (kernel == "gemv") {
      std::vector<int32_t> dot(m.padded_rows());
      for (size_t t = 0; t < tokens; ++t) {
        room.gemv(segment, m.row_blocks(), m.stride(), m.groups, in.code + t * in.shape.stride() + s * in.shape.padded,
                  in.sums[s * tokens + t], dot.data());
        for (size_t b = 0; b < m.row_blocks(); ++b) keep(t, s, b, dot.data() + b * kRowBlock);
      }
      continue;
    }
    for (size_t first = 0; first < tokens; first += tile) {
      const size_t count = std::min(tile, tokens - first);
      const int8_t* packed_codes = in.packed + first * in.shape.stride() + s * in.shape.padded * count;
      alignas(kAlignment) int32_t dot[kMaxTile * kRowBlock];
      for (size_t b = 0; b < m.row_blocks(); ++b) {
        room.gemm(segment + b * m.stride(), m.groups, packed_codes, count, in.sums + s * tokens + first, dot);
        for (size_t t = 0; t < count; ++t) keep(first + t, s, b, dot + t * kRowBlock);
      }
    }
  }
  return out.cast();
}

nb::object ternary_linear(const ArrayIn<uint8_t, 4>& packed, const ArrayIn<float, 2>& weight_scale,
                          const std::optional<FloatVector>& bias, size_t rows, size_t columns,
                          const ArrayIn<int8_t, 2>& code, const FloatVector& act_scale, const std::string& isa,
                          size_t threads, size_t block_size) {
  const KernelTable& room = room_named(isa);
  require(code.shape(1) == columns && code.shape(0) >= 1, "code must have shape [M >= 1, columns]");
  require(act_scale.shape(0) == code.shape(0), "act_scale must have one value for each row of code");
  require(!bias || bias->shape(0) == rows, "bias must have one value for each row");
  Weights weights(room, packed, rows, columns, block_size);
  TernaryMatrix& m = weights.matrix;
  const bool whole = weight_scale.shape(0) == 1 && weight_scale.shape(1) == 1 && m.segments == 1;
  require(whole || (weight_scale.shape(0) == rows && weight_scale.shape(1) == m.segments),
          "weight_scale must have shape [1, 1] or [rows, segments]");
  std::vector<float> scales(whole ? 1 : m.segments * m.padded_rows());
  if (whole) {
    scales[0] = weight_scale.data()[0];
  } else {
    for (size_t r = 0; r < rows; ++r) {
      for (size_t s = 0; s < m.segments; ++s) scales[s * m.padded_rows() + r] = weight_scale.data()[r * m.segments + s];
    }
  }
  m.scale = scales.data();
  m.scale_per_row = !whole;
  Linear linear;
  linear.ternary = m;
  linear.bias = bias ? bias->data() : nullptr;
  const size_t tokens = code.shape(0);
  Codes codes(code, code_shape(columns, block_size, room.group), tile_for(tokens, room.tile));
  std::vector<float> act_scales(act_scale.data(), act_scale.data() + tokens);
  codes.input.scale = act_scales.data();
  FloatOut out({tokens, rows});
  float* const data = out.data();
  {
    const nb::gil_scoped_release release;
    ThreadPool pool(threads);
    pool.run([&](Worker& worker) {
      linear_rows(room, linear, codes.input, {worker.share(m.row_blocks()), {0, codes.input.tokens}}, data, rows,
                  false);
    });
  }
  return out.cast();
}

void require_hadamard(size_t features, size_t block) {
  require(block == 0 || ((block & (block - 1)) == 0 && features % block == 0),
          "the Hadamard block must be a power of two that divides the columns");
}

nb::object norm_quantize(const ArrayIn<float, 2>& x, const std::optional<FloatVector>& gain, double eps,
                         const std::string& isa, const std::string& rounding, size_t bits, size_t hadamard_block) {
  const KernelTable& room = room_named(isa);
  const size_t tokens = x.shape(0), n = x.shape(1);
  require(n >= 1 && n <= kMaxFeatures, "x must have 1..2^18 columns");
  require(!gain || gain->shape(0) == n, "gain must have one value for each column");
  require(rounding == "divide" || rounding == "multiply", "rounding must be divide or multiply");
  require(bits == 8 || bits == 4, "bits must be 8 or 4");
  require_hadamard(n, hadamard_block);
  ArrayOut<int8_t> code({tokens, n});
  FloatOut scale({tokens});
  std::vector<float> normed(n);
  for (size_t t = 0; t < tokens; ++t) {
    room.rms_norm(x.data() + t * n, gain ? gain->data() : nullptr, static_cast<float>(eps), n, normed.data());
    if (hadamard_block != 0) room.hadamard(normed.data(), n, hadamard_block);
    int32_t sum;
    scale.data()[t] =
        bits == 4 ? room.quantize_int4(normed.data(), n, n, n, code.data() + t * n, &sum)
                  : room.quantize(normed.data(), n, n, n, rounding == "divide" ? Rounding::divide : Rounding::multiply,
                                  code.data() + t * n, &sum);
  }
  return nb::make_tuple(code.cast(), scale.cast());
}

nb::object hadamard(const ArrayIn<float, 2>& x, size_t block, const std::string& isa) {
  const KernelTable& room = room_named(isa);
  const size_t n = x.shape(1);
  require(block != 0, "block must be a power of two");
  require_hadamard(n, block);
  FloatOut out({x.shape(0), n});
  std::vector<float> row(n);  // of exactly the size a kernel may touch
  for (size_t t = 0; t < x.shape(0); ++t) {
    std::copy(x.data() + t * n, x.data() + (t + 1) * n, row.data());
    room.hadamard(row.data(), n, block);
    std::copy(row.begin(), row.end(), out.data() + t * n);
  }
  return out.cast();
}

nb::object attend(const ArrayIn<float, 3>& query, const ArrayIn<float, 3>& key, const ArrayIn<float, 3>& value,
                  double scale, const std::string& isa, const std::string& kv_form, size_t window) {
  const KernelTable& room = room_named(isa);
  const size_t tokens = query.shape(0), heads = query.shape(1), dim = query.shape(2);
  const size_t positions = key.shape(0), kv = key.shape(1);
  require(dim >= 1 && key.shape(2) == dim && value.shape(2) == dim,
          "query, key and value must share the last dimension");
  require(value.shape(0) == positions && value.shape(1) == kv, "key and value must have one shape");
  require(kv >= 1 && heads % kv == 0 && tokens >= 1 && tokens <= positions,
          "heads must be a multiple of KV heads, M <= T");
  Config config;
  config.num_hidden_layers = 1;
  config.num_key_value_heads = kv;
  config.head_dim = dim;
  KvCache cache(config, positions, cache_named(kv_form));
  const size_t padded = config.padded_head_dim();
  std::vector<uint16_t> half(padded);
  for (size_t p = 0; p < positions; ++p) {
    for (size_t h = 0; h < kv; ++h) {
      const size_t at = (p * kv + h) * dim;
      cache.store(room, 0, h, p, key.data() + at, value.data() + at, half.data());
    }
  }
  FloatOut out({tokens, heads, dim});
  std::vector<float> rows(kAttendRows * padded), mixed(kAttendRows * padded), scores(kAttendRows * kChunkKeys);
  std::vector<int8_t> query_code(kAttendRows * 2 * padded);
  for (size_t head = 0; head < heads; ++head) {
    for (size_t first = 0; first < tokens; first += kAttendRows) {
      const size_t count = std::min(kAttendRows, tokens - first);
      size_t seen_from[kAttendRows], visible[kAttendRows];
      for (size_t t = 0; t < count; ++t) {
        const float* from = query.data() + ((first + t) * heads + head) * dim;
        for (size_t e = 0; e < dim; ++e) rows[t * padded + e] = from[e] * static_cast<float>(scale);
        visible[t] = positions - tokens + first + t + 1;
        seen_from[t] = window == 0 || window >= visible[t] ? 0 : visible[t] - window;
      }
      const size_t own = head / (heads / kv);
      Attend args{.query = rows.data(),
                  .rows = count,
                  .first = seen_from,
                  .visible = visible,
                  .head_dim = dim,
                  .padded_dim = padded,
                  .out = mixed.data(),
                  .scores = scores.data(),
                  .query_code = query_code.data()};
      cache.show(0, own, args);
      room.attend(&args);
      for (size_t t = 0; t < count; ++t) {
        std::copy(mixed.data() + t * padded, mixed.data() + t * padded + dim,
                  out.data() + ((first + t) * heads + head) * dim);
      }
    }
  }
  return out.cast();
}

using AnyArray = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;

DenseMatrix head_matrix(const AnyArray& weight, const std::optional<AnyArray>& scale, size_t columns) {
  require(weight.ndim() >= 2 && columns <= size_t{1} << 16, "weight must have rows, and at most 65536 columns");
  DenseMatrix head{.rows = weight.shape(0), .columns = columns, .data = static_cast<const uint8_t*>(weight.data())};
  if (weight.dtype() == nb::dtype<uint8_t>()) {
    head.form = Form::int4;
    require(weight.ndim() == 3 && weight.shape(1) == head.groups() && weight.shape(2) == kInt4Rows * kInt4Group / 2,
            "int4 weights must be [V / 32, D / 64, 1024]");
    require(scale && scale->dtype() == nb::dtype<uint16_t>() && scale->ndim() == 3 &&
                scale->shape(0) == weight.shape(0) && scale->shape(1) == head.groups() && scale->shape(2) == kInt4Rows,
            "int4 weights come with bf16 scales (uint16) [V / 32, D / 64, 32]");
    head.rows *= kInt4Rows;
    head.group_scale = static_cast<const uint8_t*>(scale->data());
    return head;
  }
  require(weight.ndim() == 2 && weight.shape(1) == columns, "x must have as many columns as weight");
  if (weight.dtype() == nb::dtype<int8_t>()) {
    head.form = Form::int8;
    require(scale && scale->dtype() == nb::dtype<float>() && scale->ndim() == 1 && scale->shape(0) == head.rows,
            "int8 weights come with float scales [V]");
    head.scale = static_cast<const float*>(scale->data());
    return head;
  }
  head.form = weight.dtype() == nb::dtype<uint16_t>() ? Form::bf16 : Form::f32;
  require(!scale && (head.form == Form::bf16 || weight.dtype() == nb::dtype<float>()),
          "weight must be float32 or uint16 (bf16), or int8 or uint8 (int4) with scales");
  return head;
}

nb::object head_logits(const AnyArray& weight, const std::optional<AnyArray>& weight_scale, const ArrayIn<float, 2>& x,
                       const std::string& isa) {
  const KernelTable& room = room_named(isa);
  const DenseMatrix head = head_matrix(weight, weight_scale, x.shape(1));
  FloatOut out({x.shape(0), head.rows});
  head_rows(room, head, HeadInput(head, x.data(), x.shape(0)), {0, head.rows}, out.data());
  return out.cast();
}

nb::object pack_random(size_t rows, size_t columns, size_t block_size, uint64_t seed) {
  require(rows >= 1 && columns >= 1 && columns <= kMaxFeatures, "rows and columns must be positive, columns <= 2^18");
  const CodeShape shape = code_shape(columns, block_size, kFileGroup);
  TensorEntry entry{
      "packed", DType::u8, {ceil_div(rows, kRowBlock), shape.segments, shape.padded / kFileGroup, kGroupBytes},
      0,        0,         std::nullopt};
  ArrayOut<uint8_t> out(entry.shape);
  random_source(seed)->read(entry, 0, entry.shape[0] * entry.shape[1] * entry.shape[2] * kGroupBytes, out.data());
  return out.cast();
}

}  // namespace

void bind_kernels(nb::module_& m) {
  m.def("pack_random", &pack_random, "rows"_a, "columns"_a, "block_size"_a = 0, "seed"_a = 0);
  m.def("ternary_dot", &ternary_dot, "packed"_a, "rows"_a, "columns"_a, "code"_a, nb::kw_only(), "isa"_a, "kernel"_a,
        "block_size"_a = 0);
  m.def("ternary_linear", &ternary_linear, "packed"_a, "weight_scale"_a, "bias"_a.none(), "rows"_a, "columns"_a,
        "code"_a, "act_scale"_a, nb::kw_only(), "isa"_a, "threads"_a = 1, "block_size"_a = 0);
  m.def("norm_quantize", &norm_quantize, "x"_a, "gain"_a.none(), "eps"_a, nb::kw_only(), "isa"_a,
        "rounding"_a = "divide", "bits"_a = 8, "hadamard_block"_a = 0);
  m.def("hadamard", &hadamard, "x"_a, "block"_a, nb::kw_only(), "isa"_a);
  m.def("attend", &attend, "query"_a, "key"_a, "value"_a, "scale"_a, nb::kw_only(), "isa"_a, "kv"_a = "fp16",
        "window"_a = 0);
  m.def("head_logits", &head_logits, "weight"_a, "weight_scale"_a.none(), "x"_a, nb::kw_only(), "isa"_a);
}

}  // namespace bitdistill
