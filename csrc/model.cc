// Loading. First every tensor is found, checked against the geometry and given its place; then all threads copy, verify
// and, where the room wants another order, rearrange.
#include "model.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <exception>
#include <stdexcept>
#include <utility>

#include "screen.h"

namespace bitdistill {
namespace {

constexpr uint8_t kLastByte = 242;              // five trits: 3^5 - 1
constexpr size_t kCopyBytes = size_t{1} << 20;  // of one job

// A piece of a matrix for one thread: `count` bytes at `begin` of the tensor.
struct Job {
  const TensorEntry* entry;
  TernaryMatrix* ternary;  // null: plain copy
  uint8_t* out;            // of the whole matrix
  uint64_t begin;
  size_t count;
  std::atomic<uint64_t>* checksum;
};

}  // namespace

class Loader {
 public:
  Loader(Model& model, const std::vector<TensorEntry>& tensors) : model_(model) {
    for (const TensorEntry& entry : tensors) {
      model_.source_->check(entry);
      if (!entries_.emplace(entry.name, &entry).second) {
        throw std::invalid_argument(entry.name + " is there twice");
      }
    }
  }

  void load() {
    const Config& c = model_.config_;
    model_.embedding_ = table("model.embed_tokens", c.vocab_size, c.hidden_size, model_.memory_.embedding);
    if (!c.tie_word_embeddings) {
      model_.head_ = table("lm_head", c.vocab_size, c.hidden_size, model_.memory_.head);
    }
    model_.final_norm_ = vector("model.norm.weight", c.hidden_size);
    model_.layers_.resize(c.num_hidden_layers);  // places are pointed to from here on
    for (size_t i = 0; i < c.num_hidden_layers; ++i)
      layer(model_.layers_[i], "model.layers." + std::to_string(i) + ".");
    if (!entries_.empty()) {
      throw std::invalid_argument(describe(*entries_.begin()->second) + " belongs to no part of this decoder");
    }
    copy();
    if (c.tie_word_embeddings) model_.head_ = model_.embedding_;
  }

 private:
  void layer(Layer& layer, const std::string& prefix) {
    const Config& c = model_.config_;
    layer.attention_norm = vector(prefix + "input_layernorm.weight", c.hidden_size);
    layer.mlp_norm = vector(prefix + "post_attention_layernorm.weight", c.hidden_size);
    layer.attention_output_norm = optional_vector(prefix + "self_attn.output_norm.weight", c.hidden_size);
    layer.mlp_output_norm = optional_vector(prefix + "mlp.output_norm.weight", c.hidden_size);
    layer.q_norm = optional_vector(prefix + "self_attn.q_norm.weight", c.head_dim);
    layer.k_norm = optional_vector(prefix + "self_attn.k_norm.weight", c.head_dim);
    linear(layer.q_proj, prefix + "self_attn.q_proj", c.query_size(), c.hidden_size);
    linear(layer.k_proj, prefix + "self_attn.k_proj", c.key_size(), c.hidden_size);
    linear(layer.v_proj, prefix + "self_attn.v_proj", c.key_size(), c.hidden_size);
    linear(layer.o_proj, prefix + "self_attn.o_proj", c.hidden_size, c.query_size());
    linear(layer.gate_proj, prefix + "mlp.gate_proj", c.intermediate_size, c.hidden_size);
    linear(layer.up_proj, prefix + "mlp.up_proj", c.intermediate_size, c.hidden_size);
    linear(layer.down_proj, prefix + "mlp.down_proj", c.hidden_size, c.intermediate_size);
    if (layer.o_proj.is_ternary) layer.o_proj.hadamard_block = c.hadamard_o_proj;
    if (layer.down_proj.is_ternary) layer.down_proj.hadamard_block = c.hadamard_down_proj;
  }

  // --- finding ---

  const TensorEntry* take_if_there(const std::string& name) {
    const auto found = entries_.find(name);
    if (found == entries_.end()) return nullptr;
    const TensorEntry* entry = found->second;
    entries_.erase(found);
    return entry;
  }

  const TensorEntry& take(const std::string& name) {
    const TensorEntry* entry = take_if_there(name);
    if (entry == nullptr) throw std::invalid_argument(name + " is missing");
    return *entry;
  }

  static void require_shape(const TensorEntry& entry, const std::vector<size_t>& shape) {
    if (entry.shape == shape) return;
    TensorEntry expected = entry;
    expected.shape = shape;
    throw std::invalid_argument(describe(entry) + ": the configuration gives it the shape of " + describe(expected));
  }

  const float* optional_vector(const std::string& name, size_t n) {
    const TensorEntry* entry = take_if_there(name);
    return entry == nullptr ? nullptr : read_floats(*entry, {n}, model_.memory_.norms).data();
  }

  const float* vector(const std::string& name, size_t n) {
    return read_floats(take(name), {n}, model_.memory_.norms).data();
  }

  // Small tensors are read at once, widened, padded with zeros to 32, and must be finite.
  Array<float>& read_floats(const TensorEntry& entry, const std::vector<size_t>& shape, uint64_t& bytes) {
    require_shape(entry, shape);
    if (entry.dtype != DType::f32 && entry.dtype != DType::bf16) {
      throw std::invalid_argument(describe(entry) + ": expected F32 or BF16");
    }
    std::vector<uint8_t> raw(entry.nbytes);
    model_.source_->read(entry, 0, raw.size(), raw.data());
    if (entry.checksum && partial_checksum(raw.data(), 0, raw.size()) != *entry.checksum) corrupted(entry);
    const size_t n = raw.size() / size_of(entry.dtype);
    Array<float>& floats = model_.floats_.emplace_back(round_up(n, kRowBlock));
    model_.room_.widen(raw.data(), entry.dtype == DType::bf16 ? Float::bf16 : Float::f32, n, floats.data());
    for (size_t i = 0; i < n; ++i) {
      if (!std::isfinite(floats[i])) {
        throw std::invalid_argument(describe(entry) + ": element " + std::to_string(i) + " is not finite");
      }
    }
    bytes += floats.bytes();
    return floats;
  }

  const float* scales(const TensorEntry& entry, const std::vector<size_t>& shape) {
    const Array<float>& floats = read_floats(entry, shape, model_.memory_.scales);
    size_t n = 1;
    for (const size_t d : shape) n *= d;
    for (size_t i = 0; i < n; ++i) {
      if (!(floats[i] > 0)) {
        throw std::invalid_argument(describe(entry) + ": scale " + std::to_string(i) + " is not positive");
      }
    }
    return floats.data();
  }

  DenseMatrix dense(const TensorEntry& entry, size_t rows, size_t columns) {
    require_shape(entry, {rows, columns});
    return {.rows = rows, .columns = columns, .form = entry.dtype == DType::bf16 ? Form::bf16 : Form::f32};
  }

  DenseMatrix table(const std::string& name, size_t rows, size_t columns, uint64_t& bytes) {
    const TensorEntry& entry = take(name + ".weight");
    DenseMatrix& kept = name == "lm_head" ? model_.head_ : model_.embedding_;
    DenseMatrix matrix{.rows = rows, .columns = columns};
    if (entry.dtype == DType::u8) {
      matrix.form = Form::int4;
      const size_t blocks = ceil_div(rows, kInt4Rows);
      require_shape(entry, {blocks, matrix.groups(), kInt4Rows * kInt4Group / 2});
      const TensorEntry& scale = take(name + ".weight_scale");
      require_shape(scale, {blocks, matrix.groups(), kInt4Rows});
      if (scale.dtype != DType::bf16) throw std::invalid_argument(describe(scale) + ": expected BF16");
      place(scale, nullptr, scale.nbytes, kept.group_scale);
      bytes += scale.nbytes;
    } else if (entry.dtype == DType::i8) {
      matrix.form = Form::int8;
      require_shape(entry, {rows, columns});
      matrix.scale = scales(take(name + ".weight_scale"), {rows, 1});
    } else {
      matrix = dense(entry, rows, columns);
    }
    place(entry, nullptr, entry.nbytes, kept.data);
    bytes += entry.nbytes;
    return matrix;
  }

  void linear(Linear& linear, const std::string& name, size_t rows, size_t columns) {
    linear.name = name;
    linear.bias = optional_vector(name + ".bias", rows);
    linear.norm = optional_vector(name + ".norm.weight", columns);
    const TensorEntry& entry = take(name + ".weight");
    linear.is_ternary = entry.dtype == DType::u8;
    if (linear.is_ternary) {
      ternary(linear.ternary, entry, rows, columns);
      return;
    }
    if (entry.dtype == DType::i8) throw std::invalid_argument(describe(entry) + ": expected U8 (packed), BF16 or F32");
    linear.dense = dense(entry, rows, columns);
    place(entry, nullptr, entry.nbytes, linear.dense.data);
    model_.memory_.dense += entry.nbytes;
  }

  void ternary(TernaryMatrix& matrix, const TensorEntry& entry, size_t rows, size_t columns) {
    const size_t block = model_.config_.block_size;
    matrix.rows = rows;
    matrix.columns = columns;
    matrix.segment = block == 0 ? columns : std::min(block, columns);
    matrix.segments = ceil_div(columns, matrix.segment);
    matrix.groups = ceil_div(matrix.segment, model_.room_.group);
    const size_t file_groups = ceil_div(matrix.segment, kFileGroup);
    require_shape(entry, {matrix.row_blocks(), matrix.segments, file_groups, kGroupBytes});

    const TensorEntry& scale = take(entry.name + "_scale");
    matrix.scale_per_row = scale.shape != std::vector<size_t>{1, 1} || matrix.segments > 1;
    if (!matrix.scale_per_row) {
      matrix.scale = scales(scale, {1, 1});
    } else {
      // [rows][segments] -> [segments][padded rows]: a row block reads its scales side by side.
      const float* in = scales(scale, {rows, matrix.segments});
      Array<float>& out = model_.floats_.emplace_back(matrix.segments * matrix.padded_rows());
      for (size_t r = 0; r < rows; ++r) {
        for (size_t s = 0; s < matrix.segments; ++s) out[s * matrix.padded_rows() + r] = in[r * matrix.segments + s];
      }
      // What was read is no longer needed; it lies just before.
      std::swap(model_.floats_[model_.floats_.size() - 2], model_.floats_.back());
      matrix.scale = model_.floats_[model_.floats_.size() - 2].data();
      model_.floats_.pop_back();
    }
    const size_t bytes = matrix.row_blocks() * matrix.stride();
    place(entry, &matrix, bytes, matrix.data);
    model_.memory_.ternary += bytes;
  }

  // --- placing and copying ---

  struct Place {
    const TensorEntry* entry;
    TernaryMatrix* matrix;
    size_t bytes;
    const uint8_t** data;
  };

  // `data` receives the address once memory is there, and must stay where it is until then.
  void place(const TensorEntry& entry, TernaryMatrix* matrix, size_t bytes, const uint8_t*& data) {
    const bool as_in_file = matrix == nullptr || model_.room_.repack == nullptr;
    if (const uint8_t* shared = as_in_file ? model_.source_->in_place(entry) : nullptr) {
      shared_.emplace_back(&data, shared);
      model_.memory_.mapped += bytes;
      return;
    }
    places_.push_back({&entry, matrix, bytes, &data});
  }

  void copy() {
    for (const auto& [data, shared] : shared_) *data = shared;
    size_t total = 0;
    for (const Place& p : places_) total += round_up(p.bytes, kGroupBytes);
    model_.matrices_ = Pages(total, true);
    std::vector<Job> jobs;
    std::vector<std::atomic<uint64_t>> checksums(places_.size());
    uint8_t* at = model_.matrices_.data();
    for (size_t i = 0; i < places_.size(); ++i) {
      const Place& p = places_[i];
      *p.data = at;
      uint64_t unit = 8;  // of the checksum
      if (p.matrix != nullptr) unit = p.entry->nbytes / p.matrix->row_blocks();
      const uint64_t step = std::max<uint64_t>(unit, kCopyBytes / unit * unit);
      for (uint64_t begin = 0; begin < p.entry->nbytes; begin += step) {
        const auto count = static_cast<size_t>(std::min(step, p.entry->nbytes - begin));
        jobs.push_back({p.entry, p.matrix, at, begin, count, &checksums[i]});
      }
      at += round_up(p.bytes, kGroupBytes);
    }
    run(jobs);
    for (size_t i = 0; i < places_.size(); ++i) {
      const TensorEntry& entry = *places_[i].entry;
      if (entry.checksum && checksums[i] != *entry.checksum) corrupted(entry);
    }
  }

  void run(const std::vector<Job>& jobs) {
    std::atomic<size_t> next{0};
    std::vector<std::exception_ptr> errors(model_.pool_->size());
    model_.pool_->run([&](Worker& worker) {
      try {
        std::vector<uint8_t> buffer;
        for (size_t i; (i = next.fetch_add(1)) < jobs.size();) copy(jobs[i], buffer);
      } catch (...) {
        errors[worker.index()] = std::current_exception();
        next = jobs.size();
      }
    });
    for (const std::exception_ptr& error : errors) {
      if (error) std::rethrow_exception(error);
    }
  }

  void copy(const Job& job, std::vector<uint8_t>& buffer) {
    const bool rearrange = job.ternary != nullptr && model_.room_.repack != nullptr;
    uint8_t* to = job.out + job.begin;
    if (rearrange) {
      buffer.resize(job.count);
      to = buffer.data();
    }
    model_.source_->read(*job.entry, job.begin, job.count, to);
    *job.checksum += partial_checksum(to, job.begin, job.count);
    if (job.entry->name.ends_with("_scale")) check_group_scales(job, to);
    if (job.ternary == nullptr) return;
    if (*std::max_element(to, to + job.count) > kLastByte) {
      throw std::invalid_argument(describe(*job.entry) + ": a byte above 242 is not five trits; the file is damaged");
    }
    if (!rearrange) return;
    const TernaryMatrix& m = *job.ternary;
    const size_t in_segment = ceil_div(m.segment, kFileGroup) * kGroupBytes, out_segment = m.groups * kGroupBytes;
    const size_t first = job.begin / in_segment;
    for (size_t i = 0; i < job.count / in_segment; ++i) {
      model_.room_.repack(to + i * in_segment, m.segment, job.out + (first + i) * out_segment);
    }
  }

  // bf16 bits: positive and finite is a range of whole numbers.
  static void check_group_scales(const Job& job, const uint8_t* bytes) {
    for (size_t i = 0; i < job.count; i += 2) {
      const auto bits = static_cast<uint16_t>(bytes[i] | bytes[i + 1] << 8);
      if (bits != 0 && bits < 0x7f80) continue;
      throw std::invalid_argument(describe(*job.entry) + ": scale " + std::to_string((job.begin + i) / 2) +
                                  " is not positive and finite");
    }
  }

  [[noreturn]] static void corrupted(const TensorEntry& entry) {
    throw std::invalid_argument(describe(entry) + ": its bytes do not match its checksum; the file is damaged");
  }

  Model& model_;
  std::map<std::string, const TensorEntry*> entries_;
  std::vector<Place> places_;
  std::vector<std::pair<const uint8_t**, const uint8_t*>> shared_;
};

Model::Model(std::unique_ptr<TensorSource> source, const std::vector<TensorEntry>& tensors, Config config,
             const KernelTable& room, size_t threads, bool screened)
    : config_(std::move(config)), room_(room), source_(std::move(source)) {
  validate(config_);
  pool_ = std::make_unique<ThreadPool>(threads);
  Loader(*this, tensors).load();
  if (!screened) return;
  screen_ = std::make_unique<Screen>(room_, head_, *pool_);
  memory_.screen = screen_->bytes();
}

Model::~Model() = default;

uint64_t Model::decode_bytes(size_t context, Cache form) const {
  const uint64_t scale_bytes = has_codes(form) ? config_.num_key_value_heads * sizeof(float) : 0;
  const uint64_t key_bytes = ceil_div(config_.key_size() * cache_bits(form), 8) + scale_bytes;
  uint64_t kv = 0;
  for (const LayerAttention& layer : config_.attention) {
    kv += 2 * key_bytes * (layer.window == 0 ? context : std::min(context, layer.window));
  }
  const uint64_t head = screen_ ? screen_->bytes() : head_.rows * (head_.row_bytes() + head_.scale_bytes());
  return memory_.ternary + memory_.scales + memory_.dense + memory_.norms + head + embedding_.row_bytes() + kv;
}

}  // namespace bitdistill
