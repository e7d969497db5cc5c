// Views of tensors go to the kernels; what a device makes for itself is kept by what it was made from.
#include "gpu/model/device_ops.h"

#include "gpu/ops/elementwise.h"
#include "gpu/ops/linear.h"
#include "gpu/ops/normalize.h"
#include "gpu/ops/rope.h"
#include "gpu/ops/route.h"
#include "gpu/ops/rows.h"
#include "libshard/error.h"
#include "lm/cpu/ops.h"
#include "lm/scaled_blocks.h"

#include <algorithm>

namespace gpu {
namespace {

using shard::DType;

NormConfig config_of(const lm::Norm& norm) { return {norm.kind, norm.epsilon, norm.zero_centered}; }

/// A table of angles in device memory.
struct DeviceRope {
  DeviceBuffer memory;
  RopeView view;
};

/// The experts of every token, and their rows.
struct DeviceRouting {
  std::int64_t topk = 0;
  std::shared_ptr<std::byte> memory;
  std::int32_t* expert = nullptr;                    ///< [tokens, topk]
  float* weight = nullptr;
};

/// Streams and events that are made from here on are the device's.
DeviceInfo entered(int device) {
  use_device(device);
  return device_info(device);
}

void check_features(const View& x, const lm::Linear& by, const View& out) {
  shard::require(by.weight.columns == x.columns && by.weight.rows == out.columns, shard::Code::Mismatch,
                 [&] { return fmt::format("model: a weight takes {} features; its input has {}", by.weight.columns, x.columns); });
}

/// Parts of one piece of memory, each aligned.
class Parts {
 public:
  template <typename T>
  std::size_t add(std::size_t count) {
    const auto at = size_;
    size_ += (count * sizeof(T) + 255) / 256 * 256;
    return at;
  }
  std::size_t size() const { return size_; }

 private:
  std::size_t size_ = 0;
};
template <typename T>
T* part(const std::shared_ptr<std::byte>& memory, std::size_t at) {
  return reinterpret_cast<T*>(memory.get() + at);
}

/// Of a linear with scales.
ScaledWeight scaled_weight_of(const lm::Linear& by) {
  const auto& [weight, bias, scales] = by;
  return {view_of(weight), reinterpret_cast<const float*>(scales.data), scales.stride, weight.first_row - scales.first_row * lm::kScaleBlock, weight.first_column - scales.first_column * lm::kScaleBlock};
}

}  // namespace

View view_of(const lm::Tensor& x) { return {x.data(), x.dtype(), x.rows(), x.columns(), x.columns()}; }
View view_of(const lm::Weight& weight) { return {const_cast<std::byte*>(weight.data), weight.dtype, weight.rows, weight.columns, weight.stride}; }

/// A linear's input, and what products in fp8 see of it, by its first lane's place in a block: made when first asked for.
struct DeviceInput {
  struct Scaled {
    std::shared_ptr<std::byte> memory;
    ScaledRows rows;
  };
  View x;
  mutable std::map<lm::Index, Scaled> scaled;
};

DeviceOps::DeviceOps(OpsOptions options) : options_(std::move(options)), info_(entered(options_.device)) {
  try {
    if (is_emulated() && options_.cublaslt.empty()) products_ = "own kernels: the device is emulated";
    else matmul_.emplace(options_.device, options_.cublaslt), products_ = "cuBLASLt " + matmul_->version();
  } catch (const shard::Error& error) {
    products_ = fmt::format("own kernels: {}", error.what());
  }
  if (options_.compute == lm::Compute::Fp8) scaled_.emplace(matmul_ ? &*matmul_ : nullptr, stream_);
}

DeviceOps::~DeviceOps() {
  try {
    gpu::wait(stream_);
  } catch (...) {  // the device is lost, and reads nothing any more
  }
}

std::uint64_t DeviceOps::held() const {
  auto out = arena_.held();
  for (const auto& [key, work] : recorded_)
    for (const auto& one : work.turns) out += one.arena.held();
  return out;
}

std::vector<std::string> DeviceOps::notes() const {
  std::vector<std::string> out{"products by " + products_ + (options_.tf32 && matmul_ ? ", of f32 in TF32" : "")};
  if (scaled_) out.push_back("products in fp8 by " + scaled_->by());
  return out;
}

lm::Tensor DeviceOps::make(DType type, Index rows, Index columns) { return {arena_.take(static_cast<std::size_t>(rows * columns) * size_of(type)), type, rows, columns}; }
lm::Tensor DeviceOps::make(Index rows, Index columns) { return make(type(), rows, columns); }

std::byte* DeviceOps::pinned(std::size_t bytes) {
  if (pinned_.size() < bytes) {
    gpu::wait(stream_);
    pinned_ = PinnedBuffer(bytes);
  }
  return pinned_.data();
}

lm::Tensor DeviceOps::clone(const Tensor& x) {
  auto out = make(x.dtype(), x.rows(), x.columns());
  on_device(out.data(), x.data(), static_cast<std::size_t>(x.rows() * x.columns()) * size_of(x.dtype()), stream_);
  return out;
}

lm::Tensor DeviceOps::to_device(const Tensor& host) {
  auto wide = make(DType::F32, host.rows(), host.columns());
  gpu::to_device(wide.data(), host.data(), host.values().size_bytes(), stream_);
  gpu::wait(stream_);  // `host` is the caller's again
  if (type() == DType::F32) return wide;
  auto out = make(host.rows(), host.columns());
  convert(stream_, view_of(out), view_of(wide));
  return out;
}

lm::Tensor DeviceOps::to_host(const Tensor& x) {
  Tensor out(x.rows(), x.columns()), wide;
  const auto view = as(DType::F32, view_of(x), wide);
  gpu::to_host(out.data(), view.data, out.values().size_bytes(), stream_);
  gpu::wait(stream_);
  return out;
}

lm::Ids DeviceOps::ids(std::vector<Index> values) {
  static_assert(sizeof(Index) == sizeof(std::int64_t));
  lm::Ids out{std::move(values), {}};
  out.device = scratch(out.host.size() * sizeof(Index));
  gpu::to_device(out.device.get(), out.host.data(), out.host.size() * sizeof(Index), stream_);
  gpu::wait(stream_);
  return out;
}

View DeviceOps::as(DType wanted, const View& view, Tensor& keep) {
  if (!view || view.type == wanted) return view;
  keep = make(wanted, view.rows, view.columns);
  convert(stream_, view_of(keep), view);
  return view_of(keep);
}

void DeviceOps::store(Tensor& x, const Tensor& f32) { convert(stream_, view_of(x), view_of(f32)); }

lm::Packed DeviceOps::pack(const Tensor& x) { return {x.rows(), x.columns(), std::make_shared<const DeviceInput>(DeviceInput{view_of(x), {}})}; }

const ScaledRows& DeviceOps::scaled_input(const DeviceInput& input, Index first) {
  const auto [known, fresh] = input.scaled.try_emplace(first);
  auto& [keep, out] = known->second;
  if (!fresh) return out;
  const auto& x = input.x;
  out.first = first;
  out.scale_pitch = (x.rows + 3) / 4 * 4;
  const auto stride = (x.columns + 15) / 16 * 16;
  Parts parts;
  const auto numbers = parts.add<std::byte>(static_cast<std::size_t>(x.rows * stride)), scales = parts.add<float>(static_cast<std::size_t>(lm::blocks_of(x.columns, first) * out.scale_pitch));
  keep = scratch(parts.size());
  out.numbers = {part<std::byte>(keep, numbers), DType::F8E4M3, x.rows, x.columns, stride};
  out.scales = part<float>(keep, scales);
  quantise_rows(stream_, x, out);
  return out;
}

void DeviceOps::product(const View& x, const Linear& by, const View& out) {
  const auto w = view_of(by.weight), bias = view_of(by.bias);
  if (!matmul_) return gpu::linear(stream_, x, w, bias, out);
  Tensor w_keep, bias_keep;
  const auto same = as(x.type, w, w_keep), added = as(out.type, bias, bias_keep);
  MatmulShape shape;
  shape.rows = x.rows, shape.columns = w.rows, shape.inner = x.columns;
  shape.type = shape.w_type = x.type, shape.out_type = out.type;
  shape.x_pitch = x.stride, shape.w_pitch = same.stride, shape.out_pitch = out.stride;
  shape.bias = static_cast<bool>(added);
  shape.tf32 = options_.tf32;
  (*matmul_)(shape, {x.data, same.data, added.data, out.data}, stream_);
}

void DeviceOps::linear(const lm::Packed& x, const Linear& by, Tensor& out) {
  const lm::LinearInto one{by, out};
  linears(x, {&one, 1});
}

void DeviceOps::linears(const lm::Packed& packed, std::span<const lm::LinearInto> all) {
  const auto& input = *static_cast<const DeviceInput*>(packed.form.get());
  const auto& x = input.x;
  std::vector<LinearViews> thin;
  std::map<Index, std::vector<ScaledViews>> thin_scaled;  // by where in a block their columns begin
  for (const auto& [by, out] : all) {
    check_features(x, by, view_of(out));
    if (by.scales) {
      const auto w = scaled_weight_of(by);
      const auto& mine = scaled_input(input, w.first_column);
      if (is_thin(mine, w)) thin_scaled[w.first_column].push_back({w, view_of(by.bias), view_of(out)});
      else (*scaled_)(mine, w, view_of(by.bias), view_of(out), stream_);
    } else if (is_thin(x, view_of(by.weight))) thin.push_back({view_of(by.weight), view_of(by.bias), view_of(out)});
    else product(x, by, view_of(out));
  }
  thin_linears(stream_, x, thin);
  for (const auto& [first, some] : thin_scaled) thin_scaled_linears(stream_, scaled_input(input, first), some);
}

lm::Tensor DeviceOps::linear_f32(const Tensor& x, const Linear& by) {
  auto out = make(DType::F32, x.rows(), by.weight.rows);
  check_features(view_of(x), by, view_of(out));
  Tensor wide;
  product(as(DType::F32, view_of(x), wide), by, view_of(out));
  return out;
}

lm::Tensor DeviceOps::normalize(const Tensor& x, const lm::Norm& norm, const Linear& by) {
  auto out = make(x.rows(), x.columns());
  gpu::normalize(stream_, config_of(norm), view_of(x), view_of(by.weight), view_of(by.bias), view_of(out));
  return out;
}

void DeviceOps::normalize_into(const Tensor& x, const lm::Norm& norm, const Linear& by, Tensor& out, Index first) {
  gpu::normalize(stream_, config_of(norm), view_of(x), view_of(by.weight), view_of(by.bias), view_of(out).column_range(first, x.columns()));
}

lm::Tensor DeviceOps::add_normalize(Tensor& x, const Tensor& branch, const lm::Norm& norm, const Linear& by) {
  auto out = make(x.rows(), x.columns());
  gpu::add_normalize(stream_, config_of(norm), view_of(x), view_of(branch), view_of(by.weight), view_of(by.bias), view_of(out));
  return out;
}

void DeviceOps::normalize_pieces(Tensor& x, Index pieces, Index width, const lm::Norm& norm, const Linear& by) {
  gpu::normalize_pieces(stream_, config_of(norm), view_of(x), pieces, width, view_of(by.weight), view_of(by.bias));
}

lm::Rope DeviceOps::rope(const shard::RopeConfig& config, Index length) {
  // A long table takes the host milliseconds, in which the device would wait.
  for (const auto& known : ropes_)
    if (known.length == length && known.config == config) return known.rope;
  auto table = lm::cpu::rope_table(config, length);
  if (table.half == 0) return {};
  // In bf16 the table's numbers are rounded.
  const auto on = lm::cpu::Context{options_.compute, 1};
  lm::cpu::round_values(on, table.cos);
  lm::cpu::round_values(on, table.sin);
  const auto bytes = table.cos.size() * sizeof(float);
  auto made = std::make_shared<DeviceRope>();
  made->memory = DeviceBuffer(2 * bytes);
  gpu::to_device(made->memory.data(), table.cos.data(), bytes, stream_);
  gpu::to_device(made->memory.data() + bytes, table.sin.data(), bytes, stream_);
  gpu::wait(stream_);
  made->view = {reinterpret_cast<const float*>(made->memory.data()), reinterpret_cast<const float*>(made->memory.data() + bytes), table.half, table.interleaved};
  return ropes_.emplace_back(Angles{config, length, {std::move(made)}}).rope;
}

void DeviceOps::apply_rope(const lm::Rope& rope, Tensor& x, Index first, Index heads, Index stride, Index length) {
  if (!rope.form) return;
  const auto& table = static_cast<const DeviceRope*>(rope.form.get())->view;
  gpu::apply_rope(stream_, table, view_of(x).column_range(first, x.columns() - first), heads, stride, length);
}

void DeviceOps::copy_pieces(const Tensor& from, Index from_first, Index from_stride, Tensor& to, Index to_first, Index to_stride, Index pieces, Index width) {
  const Piece piece{view_of(from).column_range(from_first, width), view_of(to).column_range(to_first, width), pieces, from_stride, to_stride};
  gpu::copy_pieces(stream_, {&piece, 1});
}

void DeviceOps::add(Tensor& a, const Tensor& b) { gpu::add(stream_, view_of(a), view_of(b)); }
void DeviceOps::scale(Tensor& a, double factor) {
  if (factor != 1) gpu::scale(stream_, view_of(a), factor);
}
void DeviceOps::softcap(Tensor& a, double cap) {
  if (cap != 0) gpu::softcap(stream_, view_of(a), cap);
}
void DeviceOps::gate_rows(Tensor& x, const Tensor& gate) { gpu::gate_rows(stream_, view_of(x), view_of(gate)); }
void DeviceOps::activate(const shard::TransformerConfig& config, const Tensor* gate, Tensor& up) {
  gpu::activate(stream_, activation_config(config), gate ? view_of(*gate) : View{}, view_of(up));
}

lm::Routing DeviceOps::route(const shard::RouterConfig& config, const Tensor& logits, const lm::Weight& bias) {
  const auto experts = logits.columns();
  shard::require(config.topk > 0 && config.topk <= experts && config.topk <= kMaxTopk && experts <= kMaxExperts, shard::Code::Mismatch,
                 [&] { return fmt::format("model: the router takes {} of {} experts; at most {} of {} are supported on a device", config.topk, experts, kMaxTopk, kMaxExperts); });
  auto out = std::make_shared<DeviceRouting>();
  const auto count = static_cast<std::size_t>(logits.rows() * config.topk);
  Parts parts;
  const auto expert = parts.add<std::int32_t>(count), weight = parts.add<float>(count);
  out->topk = config.topk;
  out->memory = scratch(parts.size());
  out->expert = part<std::int32_t>(out->memory, expert);
  out->weight = part<float>(out->memory, weight);
  gpu::route(stream_, config, view_of(logits), view_of(bias), lm::rounds_to_bf16(options_.compute) && !config.fp32, out->expert, out->weight);
  return {std::move(out)};
}

const std::byte* const* DeviceOps::pointers(const std::vector<const std::byte*>& list) {
  auto& known = pointers_[list];
  if (!known) {
    known = DeviceBuffer(list.size() * sizeof(list[0]));
    gpu::to_device(known.data(), list.data(), known.size(), stream_);
    gpu::wait(stream_);
  }
  return reinterpret_cast<const std::byte* const*>(known.data());
}

lm::Tensor DeviceOps::experts(const shard::TransformerConfig& config, const Tensor& x, const lm::Routing& routing,
                              const std::function<lm::FeedForward(Index expert)>& weights) {
  const auto& chosen = *static_cast<const DeviceRouting*>(routing.form.get());
  const auto tokens = x.rows(), count = config.num_experts, rows = tokens * chosen.topk;
  // Every expert's linear of one kind, as one list of addresses.
  struct Kind {
    std::vector<const std::byte*> data, bias, scales;
    lm::Weight like;
    ScaledWeight scaled;
    DType bias_type = DType::F32;
    void add(const Linear& linear) {
      if (data.empty()) like = linear.weight, bias_type = linear.bias.dtype, scaled = linear.scales ? scaled_weight_of(linear) : ScaledWeight{};
      shard::require(linear.weight.rows == like.rows && linear.weight.columns == like.columns && linear.weight.stride == like.stride && linear.weight.dtype == like.dtype &&
                         (!linear.bias || linear.bias.dtype == bias_type),
                     shard::Code::Mismatch, [] { return std::string("model: experts of one layer differ in shape or type"); });
      data.push_back(linear.weight.data);
      if (linear.bias) bias.push_back(linear.bias.data);
      if (linear.scales) scales.push_back(linear.scales.data);
    }
  } gate, up, down;
  for (Index e = 0; e < count; ++e) {
    const auto expert = weights(e);
    if (expert.gate.weight) gate.add(expert.gate);
    up.add(expert.up);
    down.add(expert.down);
  }

  Parts parts;
  const auto offsets = parts.add<std::int32_t>(static_cast<std::size_t>(count + 1)), tiles = parts.add<std::int32_t>(static_cast<std::size_t>(count + 1)),
             token = parts.add<std::int32_t>(static_cast<std::size_t>(rows)), weight = parts.add<float>(static_cast<std::size_t>(rows)),
             row = parts.add<std::int32_t>(static_cast<std::size_t>(rows));
  const auto memory = scratch(parts.size());
  const Permutation order{part<std::int32_t>(memory, offsets), part<std::int32_t>(memory, tiles), part<std::int32_t>(memory, token), part<float>(memory, weight),
                          part<std::int32_t>(memory, row)};
  permute(stream_, tokens, chosen.topk, count, chosen.expert, chosen.weight, order);
  auto gathered = make(rows, x.columns());
  gather_rows(stream_, view_of(gathered), view_of(x), order.token, config.moe_probs_on_input ? order.weight : nullptr);
  const auto by = [&](const Kind& kind, const DeviceInput& in, const float* row_weights) {
    auto out = make(rows, kind.like.rows);
    // One type for both; biases of other types would need a list of copies.
    const bool scaled = !kind.scales.empty();
    shard::require(kind.bias.empty() || scaled || kind.bias_type == kind.like.dtype, shard::Code::Mismatch,
                   [&] { return fmt::format("model: experts with {} weights and {} biases are not supported on a device", shard::name(kind.like.dtype), shard::name(kind.bias_type)); });
    const ExpertWeights w{pointers(kind.data), kind.bias.empty() ? nullptr : pointers(kind.bias), scaled ? kind.bias_type : kind.like.dtype, kind.like.rows, kind.like.columns, kind.like.stride};
    if (scaled)
      grouped_scaled_linear(stream_, scaled_input(in, kind.scaled.first_column), w, reinterpret_cast<const float* const*>(pointers(kind.scales)), kind.scaled, count, order.offsets, order.tiles,
                            row_weights, view_of(out));
    else grouped_linear(stream_, in.x, w, count, order.offsets, order.tiles, row_weights, view_of(out));
    return out;
  };
  const DeviceInput chosen_rows{view_of(gathered), {}};
  auto fed = by(up, chosen_rows, nullptr);
  const auto opened = gate.data.empty() ? Tensor() : by(gate, chosen_rows, nullptr);
  activate(config, gate.data.empty() ? nullptr : &opened, fed);
  const bool weighed = !config.moe_probs_on_input;
  if (weighed) scale_rows(stream_, view_of(fed), order.weight);
  const auto parts_out = by(down, DeviceInput{view_of(fed), {}}, weighed ? order.weight : nullptr);
  auto out = make(tokens, config.hidden_size);
  combine(stream_, view_of(out), view_of(parts_out), chosen.topk, order.row);
  return out;
}

StepInputs DeviceOps::places(const Tensor& hidden, const std::vector<Index>& ids, const std::vector<Index>& positions) {
  return {make(hidden.rows(), hidden.columns()), {ids, scratch(ids.size() * sizeof(Index))}, {positions, scratch(positions.size() * sizeof(Index))}};
}

lm::Tensor DeviceOps::recorded(const std::string& key, const Tensor& hidden, const std::vector<Index>& ids, const std::vector<Index>& positions, const Step& step) {
  constexpr std::size_t kTurns = 2;                  // a caller holds one result while it asks for the next
  auto& known = recorded_[key];
  auto& turns = known.turns;
  auto free = std::find_if(turns.begin(), turns.end(), [](const Recording& one) { return one.out.use_count() == 1; });
  const bool first = known.runs++ == 0;              // tables are made, algorithms searched, code loaded
  if (!options_.graphs || first || (free == turns.end() && turns.size() == kTurns)) {
    const auto inputs = places(hidden, ids, positions);
    uploads_.send(hidden, ids, positions, inputs, stream_);
    uploads_.sent(stream_);
    return step(inputs.hidden, inputs.ids, inputs.positions);
  }
  if (free == turns.end()) free = turns.insert(free, record(hidden, ids, positions, step));
  uploads_.send(hidden, ids, positions, free->inputs, stream_);
  free->graph.launch(stream_);
  uploads_.sent(stream_);                            // behind the graph, which need not wait for the host to say so
  auto& out = free->out;
  return {std::shared_ptr<std::byte>(out, out->data()), out->dtype(), out->rows(), out->columns()};
}

DeviceOps::Recording DeviceOps::record(const Tensor& hidden, const std::vector<Index>& ids, const std::vector<Index>& positions, const Step& step) {
  Recording out;
  {
    struct Lend {
      Arena &mine, &its;
      Lend(Arena& a, Arena& b) : mine(a), its(b) { std::swap(mine, its); }
      ~Lend() { std::swap(mine, its); }
    } lend{arena_, out.arena};
    out.inputs = places(hidden, ids, positions);
    Graph::begin(stream_);
    try {
      out.out = std::make_shared<Tensor>(step(out.inputs.hidden, out.inputs.ids, out.inputs.positions));
    } catch (...) {
      try {
        Graph::end(stream_);
      } catch (const shard::Error&) {  // what broke the recording is told
      }
      throw;
    }
    out.graph = Graph::end(stream_);
  }
  return out;
}

}  // namespace gpu
