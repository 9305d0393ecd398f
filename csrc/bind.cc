// The Python module: checks arguments, releases the GIL, calls. Documented in src/bitdistill/_core.pyi.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <map>
#include <stdexcept>
#include <system_error>

#include "bind_arrays.h"
#include "dispatch.h"
#include "label_head.h"
#include "probe.h"
#include "session.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace bitdistill {

void bind_kernels(nb::module_& m);

namespace {

std::vector<std::string> names(std::span<const KernelTable* const> rooms, uint32_t features) {
  std::vector<std::string> out;
  for (const KernelTable* room : rooms) {
    if ((room->features & ~features) == 0) out.emplace_back(room->name);
  }
  return out;
}

size_t not_negative(const char* what, int64_t value) {
  if (value < 0) throw std::invalid_argument(std::string(what) + " = " + std::to_string(value) + " is negative");
  return static_cast<size_t>(value);
}

std::shared_ptr<Model> load(const std::optional<std::string>& path, const std::vector<TensorEntry>& tensors,
                            const Config& config, int64_t threads, bool mmap, const std::optional<std::string>& isa,
                            uint64_t seed, bool screened) {
  const KernelTable& room = select_room(isa, cpu_features(), true);
  const size_t count = not_negative("threads", threads);
  const nb::gil_scoped_release release;
  auto source = path ? open_file(*path, mmap) : random_source(seed);
  return std::make_shared<Model>(std::move(source), tensors, config, room, count, screened);
}

std::span<const int32_t> view(const Tokens& tokens) { return {tokens.data(), tokens.shape(0)}; }

nb::object forward(Session& session, const Tokens& tokens, bool all_positions) {
  const size_t vocabulary = session.model().config().vocab_size;
  std::vector<size_t> shape{vocabulary};
  if (all_positions) shape.insert(shape.begin(), tokens.shape(0));
  FloatOut out(shape);
  {
    const nb::gil_scoped_release release;
    session.forward(view(tokens), all_positions, out.data());
  }
  return out.cast();
}

nb::object forward_tapped(Session& session, const Tokens& tokens) {
  FloatOut out({tokens.shape(0), session.model().config().vocab_size});
  Taps taps;
  {
    const nb::gil_scoped_release release;
    session.forward(view(tokens), true, out.data(), &taps);
  }
  nb::dict values;
  for (const auto& [name, tap] : taps) {
    if (tap.codes.empty()) {
      FloatOut array(tap.shape);
      std::copy(tap.floats.begin(), tap.floats.end(), array.data());
      values[name.c_str()] = array.cast();
    } else {
      ArrayOut<int8_t> array(tap.shape);
      std::copy(tap.codes.begin(), tap.codes.end(), array.data());
      values[name.c_str()] = array.cast();
    }
  }
  return nb::make_tuple(out.cast(), values);
}

nb::object score(Session& session, const Tokens& tokens, int64_t first) {
  const size_t from = not_negative("first", first), count = tokens.shape(0);
  FloatOut out({count - std::min(from, count)});
  {
    const nb::gil_scoped_release release;
    session.score(view(tokens), from, out.data());
  }
  return out.cast();
}

const char* name_of(Finish finish) {
  return finish == Finish::stop ? "stop" : finish == Finish::length ? "length" : "context";
}

nb::object decode(Session& session, Sampler& sampler, int64_t max_new_tokens, const std::vector<int32_t>& stop) {
  const size_t most = not_negative("max_new_tokens", max_new_tokens);
  std::vector<int32_t> tokens;
  Finish finish;
  {
    const nb::gil_scoped_release release;
    finish = session.decode(sampler, most, stop, tokens);
  }
  return nb::make_tuple(tokens, name_of(finish));
}

nb::object forward_together(const std::vector<Session*>& sessions, const std::vector<Tokens>& tokens) {
  if (sessions.empty()) throw std::invalid_argument("no sessions: give at least one");
  std::vector<std::span<const int32_t>> views;
  for (const Tokens& one : tokens) views.push_back(view(one));
  FloatOut out({sessions.size(), sessions[0]->model().config().vocab_size});
  {
    const nb::gil_scoped_release release;
    Session::forward_together(sessions, views, out.data());
  }
  return out.cast();
}

nb::object decode_together(const std::vector<Session*>& sessions, const std::vector<Sampler*>& samplers,
                           int64_t max_new_tokens, const std::vector<int32_t>& stop) {
  const size_t most = not_negative("max_new_tokens", max_new_tokens);
  std::vector<std::vector<int32_t>> tokens;
  std::vector<Finish> finish;
  {
    const nb::gil_scoped_release release;
    finish = Session::decode_together(sessions, samplers, most, stop, tokens);
  }
  nb::list found;
  for (size_t s = 0; s < tokens.size(); ++s) found.append(nb::make_tuple(tokens[s], name_of(finish[s])));
  return found;
}

nb::object label_logits(LabelHead& head, const std::vector<Tokens>& texts) {
  std::vector<std::span<const int32_t>> views;
  for (const Tokens& text : texts) views.push_back(view(text));
  FloatOut out({texts.size(), head.labels()});
  {
    const nb::gil_scoped_release release;
    head.logits(views, out.data());
  }
  return out.cast();
}

nb::dict memory_of(const Model& model) {
  const ModelMemory& m = model.memory();
  nb::dict bytes;
  bytes["ternary"] = m.ternary;
  bytes["scales"] = m.scales;
  bytes["dense"] = m.dense;
  bytes["norms"] = m.norms;
  bytes["embedding"] = m.embedding;
  bytes["head"] = m.head;
  bytes["screen"] = m.screen;
  bytes["mapped"] = m.mapped;
  return bytes;
}

nb::dict describe_config(const Model& model) {
  const Config& c = model.config();
  nb::dict fields;
  fields["vocab_size"] = c.vocab_size;
  fields["hidden_size"] = c.hidden_size;
  fields["intermediate_size"] = c.intermediate_size;
  fields["num_hidden_layers"] = c.num_hidden_layers;
  fields["num_attention_heads"] = c.num_attention_heads;
  fields["num_key_value_heads"] = c.num_key_value_heads;
  fields["head_dim"] = c.head_dim;
  fields["max_context"] = c.max_context;
  fields["tie_word_embeddings"] = c.tie_word_embeddings;
  return fields;
}

using Ropes = std::vector<std::pair<std::vector<double>, double>>;
using LayerRopes = std::optional<std::vector<std::optional<size_t>>>;

void set_attention(Config& config, const Ropes& ropes, const LayerRopes& layer_ropes,
                   const std::optional<std::vector<size_t>>& layer_windows) {
  for (const auto& [inv_freq, scale] : ropes) {
    Rope& rope = config.ropes.emplace_back();
    rope.inv_freq.assign(inv_freq.begin(), inv_freq.end());
    rope.scale = static_cast<float>(scale);
  }
  const size_t layers = config.num_hidden_layers;
  if (layers > 4096 || (layer_ropes && layer_ropes->size() != layers) ||
      (layer_windows && layer_windows->size() != layers)) {
    return;  // validate() names what is wrong
  }
  config.attention.resize(layers);
  for (size_t i = 0; i < layers; ++i) {
    if (layer_ropes) config.attention[i].rope = (*layer_ropes)[i].value_or(LayerAttention::kNoRope);
    if (layer_windows) config.attention[i].window = (*layer_windows)[i];
  }
}

void bind_model(nb::module_& m) {
  nb::class_<TensorEntry>(m, "Tensor", nb::is_final())
      .def(
          "__init__",
          [](TensorEntry* self, std::string name, const std::string& dtype, std::vector<size_t> shape, uint64_t offset,
             uint64_t nbytes, std::optional<uint64_t> checksum) {
            new (self) TensorEntry{std::move(name), dtype_named(dtype), std::move(shape), offset, nbytes, checksum};
          },
          "name"_a, "dtype"_a, "shape"_a, "offset"_a, "nbytes"_a, "checksum"_a = nb::none());

  nb::class_<Config>(m, "Config", nb::is_final())
      .def(
          "__init__",
          [](Config* self, size_t vocab_size, size_t hidden_size, size_t intermediate_size, size_t num_hidden_layers,
             size_t num_attention_heads, size_t num_key_value_heads, size_t head_dim, size_t max_context,
             double rms_norm_eps, const std::string& hidden_act, const Ropes& ropes, const LayerRopes& layer_ropes,
             const std::optional<std::vector<size_t>>& layer_windows, std::optional<double> attention_scale,
             double embedding_scale, bool tie_word_embeddings, std::optional<size_t> block_size,
             const std::string& activation_rounding, size_t activation_bits,
             const std::map<std::string, size_t>& hadamard, size_t query_bits, size_t kv_bits) {
            Config config;
            config.vocab_size = vocab_size;
            config.hidden_size = hidden_size;
            config.intermediate_size = intermediate_size;
            config.num_hidden_layers = num_hidden_layers;
            config.num_attention_heads = num_attention_heads;
            config.num_key_value_heads = num_key_value_heads;
            config.head_dim = head_dim;
            config.max_context = max_context;
            config.rms_norm_eps = static_cast<float>(rms_norm_eps);
            config.hidden_act = one_of<Activation>(
                "hidden_act", hidden_act,
                {{"silu", Activation::silu}, {"relu2", Activation::relu2}, {"gelu_tanh", Activation::gelu_tanh}});
            set_attention(config, ropes, layer_ropes, layer_windows);
            config.attention_scale = static_cast<float>(attention_scale.value_or(1 / std::sqrt(double(head_dim))));
            config.embedding_scale = static_cast<float>(embedding_scale);
            config.tie_word_embeddings = tie_word_embeddings;
            if (block_size == 0) throw std::invalid_argument("block_size = 0: use None for no blocks");
            config.block_size = block_size.value_or(0);
            config.activation_rounding =
                one_of<Rounding>("activation_rounding", activation_rounding,
                                 {{"divide", Rounding::divide}, {"multiply", Rounding::multiply}});
            config.activation_bits = activation_bits;
            config.query_bits = query_bits;
            config.kv_bits = kv_bits;
            for (const auto& [site, block] : hadamard) {
              if (block == 0) throw std::invalid_argument("hadamard block 0 of " + site + ": leave the site out");
              *one_of<size_t*>("hadamard", site,
                               {{"o_proj", &config.hadamard_o_proj}, {"down_proj", &config.hadamard_down_proj}}) =
                  block;
            }
            validate(config);
            new (self) Config(std::move(config));
          },
          nb::kw_only(), "vocab_size"_a, "hidden_size"_a, "intermediate_size"_a, "num_hidden_layers"_a,
          "num_attention_heads"_a, "num_key_value_heads"_a, "head_dim"_a, "max_context"_a, "rms_norm_eps"_a,
          "hidden_act"_a, "ropes"_a, "layer_ropes"_a = nb::none(), "layer_windows"_a = nb::none(),
          "attention_scale"_a = nb::none(), "embedding_scale"_a = 1.0, "tie_word_embeddings"_a = false,
          "block_size"_a = nb::none(), "activation_rounding"_a = "divide", "activation_bits"_a = 8,
          "hadamard"_a = std::map<std::string, size_t>(), "query_bits"_a = 16, "kv_bits"_a = 16);

  nb::class_<Model>(m, "Model", nb::is_final())
      .def(nb::new_(&load), "path"_a.none(), "tensors"_a, "config"_a, nb::kw_only(), "threads"_a = 0, "mmap"_a = false,
           "isa"_a = nb::none(), "seed"_a = 0, "screened"_a = false)
      .def_prop_ro("isa", [](const Model& self) { return std::string(self.room().name); })
      .def_prop_ro("threads", [](const Model& self) { return self.pool().size(); })
      .def_prop_ro("config", &describe_config)
      .def("memory", &memory_of)
      .def(
          "decode_bytes",
          [](const Model& self, int64_t context, const std::string& kv) {
            return self.decode_bytes(not_negative("context", context), cache_named(kv));
          },
          "context"_a = 0, "kv"_a = "fp16");
}

void bind_session(nb::module_& m) {
  nb::class_<Sampler>(m, "Sampler", nb::is_final())
      .def(nb::init<double, int64_t, double, uint64_t>(), nb::kw_only(), "temperature"_a = 0.0, "top_k"_a = 0,
           "top_p"_a = 1.0, "seed"_a = 0)
      .def(
          "sample",
          [](Sampler& self, const FloatVector& logits) {
            const nb::gil_scoped_release release;
            return self.sample(logits.data(), logits.shape(0));
          },
          "logits"_a);

  nb::class_<Session>(m, "Session", nb::is_final())
      .def(
          "__init__",
          [](Session* self, std::shared_ptr<Model> model, int64_t context, const std::string& kv) {
            new (self) Session(std::move(model), not_negative("context", context), cache_named(kv));
          },
          "model"_a, nb::kw_only(), "context"_a = 0, "kv"_a = "fp16")
      .def_prop_ro("position", &Session::position)
      .def_prop_ro("context", &Session::context)
      .def("memory",
           [](const Session& self) {
             nb::dict bytes;
             bytes["kv_cache"] = self.cache_bytes();
             bytes["scratch"] = self.scratch_bytes();
             return bytes;
           })
      .def_prop_ro("rescored_rows", &Session::rescored_rows)
      .def("start_profile", &Session::start_profile)
      .def_prop_ro("profile",
                   [](const Session& self) {
                     nb::dict seconds;
                     if (!self.profile()) return seconds;
                     for (size_t i = 0; i < kPhaseNames.size(); ++i)
                       seconds[kPhaseNames[i]] = self.profile()->seconds()[i];
                     return seconds;
                   })
      .def("forward", &forward, "tokens"_a, nb::kw_only(), "all_positions"_a = false)
      .def("score", &score, "tokens"_a, "first"_a = 1)
      .def("decode", &decode, "sampler"_a, "max_new_tokens"_a, "stop"_a = std::vector<int32_t>())
      .def(
          "truncate", [](Session& self, int64_t position) { self.truncate(not_negative("position", position)); },
          "position"_a)
      .def("forward_tapped", &forward_tapped, "tokens"_a);
  nb::class_<LabelHead>(m, "LabelHead", nb::is_final())
      .def(
          "__init__",
          [](LabelHead* self, std::shared_ptr<Model> model, const std::vector<int32_t>& labels, const std::string& kv) {
            new (self) LabelHead(std::move(model), labels, cache_named(kv));
          },
          "model"_a, "labels"_a, nb::kw_only(), "kv"_a = "fp16")
      .def("logits", &label_logits, "texts"_a);
  m.def("forward_together", &forward_together, "sessions"_a, "tokens"_a);
  m.def("decode_together", &decode_together, "sessions"_a, "samplers"_a, "max_new_tokens"_a,
        "stop"_a = std::vector<int32_t>());
}

void bind_machine(nb::module_& m) {
  m.def("compiled_isas", [] { return names(compiled_rooms(), ~0u); });
  m.def("available_isas", [] { return names(compiled_rooms(), cpu_features()); });
  m.def(
      "select_isa",
      [](const std::optional<std::string>& forced, const std::optional<std::vector<std::string>>& features) {
        const uint32_t bits = features ? features_from_names(*features) : cpu_features();
        return std::string(select_room(forced, bits, true).name);
      },
      "forced"_a = nb::none(), "features"_a = nb::none());
  m.def(
      "probe_bandwidth",
      [](int64_t threads, double seconds) {
        const KernelTable& room = select_room(std::nullopt, cpu_features(), true);
        const size_t count = not_negative("threads", threads);
        const nb::gil_scoped_release release;
        return probe_bandwidth(room, count, seconds);
      },
      "threads"_a, "seconds"_a = 0.3);
  m.def(
      "probe_int8",
      [](int64_t threads, double seconds, const std::optional<std::string>& isa) {
        const KernelTable& room = select_room(isa, cpu_features(), true);
        const size_t count = not_negative("threads", threads);
        const nb::gil_scoped_release release;
        return probe_int8(room, count, seconds);
      },
      "threads"_a, "seconds"_a = 0.2, "isa"_a = nb::none());
  m.def("memory_usage", [] {
    const MemoryUsage usage = memory_usage();
    nb::dict bytes;
    bytes["resident"] = usage.resident;
    bytes["peak_resident"] = usage.peak_resident;
    return bytes;
  });
}

}  // namespace
}  // namespace bitdistill

NB_MODULE(_core, m) {
  using namespace bitdistill;
  nb::register_exception_translator([](const std::exception_ptr& pointer, void*) {
    try {
      std::rethrow_exception(pointer);
    } catch (const std::system_error& error) {
      PyErr_SetObject(PyExc_OSError, nb::make_tuple(error.code().value(), error.what()).ptr());
    }
  });
  bind_machine(m);
  bind_model(m);
  bind_session(m);
  bind_kernels(m);
}
