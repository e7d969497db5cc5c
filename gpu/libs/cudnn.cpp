// Descriptors of the graph, an engine that takes it, and running it.
#include "gpu/libs/cudnn.h"

#include "gpu/libs/library.h"
#include "libshard/error.h"

#if __has_include(<cudnn_graph.h>)
#include <cudnn_graph.h>
#endif

#include <limits>
#include <map>
#include <vector>

namespace gpu {

using shard::Code;
using shard::DType;

std::string attention_refusal(const AttentionShape& s) {
  if (s.type != DType::BF16 && s.type != DType::F16) return fmt::format("cuDNN's fused attention takes bf16 and f16, not {}", shard::name(s.type));
  if (s.softcap != 0) return "cuDNN's fused attention has no soft cap on its scores";
  if (s.sinks) return "attention sinks are not given to cuDNN's fused attention";
  if (s.batch < 1 || s.queries < 1 || s.keys < 1 || s.head_size < 1 || s.value_size < 1 || s.groups < 1) return "there are no elements";
  if (s.heads % s.groups != 0) return fmt::format("{} heads cannot share {} heads of keys", s.heads, s.groups);
  if (s.head_size != s.value_size) return fmt::format("keys of {} and values of {} elements a head are not given to cuDNN's fused attention", s.head_size, s.value_size);
  if (s.head_size % 8 != 0 || s.head_size > 256) return fmt::format("cuDNN's fused attention takes heads of up to 256 elements that 8 divides, not {}", s.head_size);
  if (s.causal && s.queries != s.keys) return fmt::format("a causal mask over {} queries and {} keys is not given to cuDNN's fused attention", s.queries, s.keys);
  if (s.window < 0 || (s.window > 0 && !s.causal)) return "a window without a causal mask is not given to cuDNN's fused attention";
  return "";
}

#if __has_include(<cudnn_graph.h>)

namespace {

constexpr std::size_t kLeastVersion = 90000;

struct Api {
  explicit Api(const std::string& path) : library("cuDNN", path, {"libcudnn.so.9"}) {
    library.resolve(get_version, "cudnnGetVersion");
    library.resolve(text, "cudnnGetErrorString");
    library.resolve(last_error, "cudnnGetLastErrorString");
    library.resolve(create_handle, "cudnnCreate");
    library.resolve(destroy_handle, "cudnnDestroy");
    library.resolve(set_stream, "cudnnSetStream");
    library.resolve(create, "cudnnBackendCreateDescriptor");
    library.resolve(destroy, "cudnnBackendDestroyDescriptor");
    library.resolve(set, "cudnnBackendSetAttribute");
    library.resolve(get, "cudnnBackendGetAttribute");
    library.resolve(finalize, "cudnnBackendFinalize");
    library.resolve(execute, "cudnnBackendExecute");
    const auto number = get_version();
    version = fmt::format("{}.{}.{}", number / 10000, number / 100 % 100, number % 100);
    shard::require(number >= kLeastVersion, Code::Device, [&] { return fmt::format("{}: is version {}; 9.0 is the least", library.title(), version); });
  }
  /// cuDNN's word for a status, and the condition that it found wrong.
  std::string reason(cudnnStatus_t status) const {
    char detail[1024] = "";
    last_error(detail, sizeof detail);
    std::string out = text(status);
    if (*detail) out += fmt::format(" ({})", detail);
    return out;
  }
  void check(cudnnStatus_t status, std::string_view doing) const {
    shard::require(status == CUDNN_STATUS_SUCCESS, Code::Device, [&] { return fmt::format("{}: {}: {}", library.title(), doing, reason(status)); });
  }

  Library library;
  std::string version;
  decltype(&cudnnGetVersion) get_version;
  decltype(&cudnnGetErrorString) text;
  decltype(&cudnnGetLastErrorString) last_error;
  decltype(&cudnnCreate) create_handle;
  decltype(&cudnnDestroy) destroy_handle;
  decltype(&cudnnSetStream) set_stream;
  decltype(&cudnnBackendCreateDescriptor) create;
  decltype(&cudnnBackendDestroyDescriptor) destroy;
  decltype(&cudnnBackendSetAttribute) set;
  decltype(&cudnnBackendGetAttribute) get;
  decltype(&cudnnBackendFinalize) finalize;
  decltype(&cudnnBackendExecute) execute;
};

class Descriptor {
 public:
  Descriptor(const Api& api, cudnnBackendDescriptorType_t type) : api_(&api) { api.check(api.create(type, &raw_), "making a descriptor"); }
  Descriptor(Descriptor&& other) noexcept : api_(other.api_), raw_(std::exchange(other.raw_, nullptr)) {}
  Descriptor& operator=(Descriptor&& other) noexcept {
    std::swap(api_, other.api_);
    std::swap(raw_, other.raw_);
    return *this;
  }
  ~Descriptor() {
    if (raw_) api_->destroy(raw_);
  }
  cudnnBackendDescriptor_t raw() const { return raw_; }

  Descriptor& set(cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type, std::int64_t count, const void* values) {
    api_->check(api_->set(raw_, name, type, count, values), "describing");
    return *this;
  }
  template <typename T>
  Descriptor& set(cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type, const T& value) {
    return set(name, type, 1, &value);
  }
  Descriptor& set(cudnnBackendAttributeName_t name, const Descriptor& other) { return set(name, CUDNN_TYPE_BACKEND_DESCRIPTOR, other.raw_); }
  Descriptor& set(cudnnBackendAttributeName_t name, const std::vector<std::int64_t>& values) {
    return set(name, CUDNN_TYPE_INT64, static_cast<std::int64_t>(values.size()), values.data());
  }
  cudnnStatus_t try_finalize() { return api_->finalize(raw_); }
  Descriptor& finalize(std::string_view what) {
    api_->check(try_finalize(), what);
    return *this;
  }

 private:
  const Api* api_;
  cudnnBackendDescriptor_t raw_ = nullptr;
};

/// The tensors that a caller brings.
enum Id : std::int64_t { kQ = 1, kK, kV, kOut, kScale, kMasked, kWindow, kFirstInner };

/// The operations, in order; tensors live as long as it does.
class AttentionGraph {
 public:
  AttentionGraph(const Api& api, const AttentionShape& shape) : api_(api), s_(shape) {
    const auto io = shape.type == DType::BF16 ? CUDNN_DATA_BFLOAT16 : CUDNN_DATA_HALF;
    const auto& q = tensor(kQ, io, {s_.batch, s_.heads, s_.queries, s_.head_size}, {s_.q.batch, s_.q.head, s_.q.token, 1});
    const auto& k = tensor(kK, io, {s_.batch, s_.groups, s_.head_size, s_.keys}, {s_.k.batch, s_.k.head, 1, s_.k.token});  // transposed
    const auto& v = tensor(kV, io, {s_.batch, s_.groups, s_.keys, s_.value_size}, {s_.v.batch, s_.v.head, s_.v.token, 1});
    const auto& out = tensor(kOut, io, {s_.batch, s_.heads, s_.queries, s_.value_size}, {s_.out.batch, s_.out.head, s_.out.token, 1});

    const auto* scores = &inner();
    product(q, k, *scores);
    scores = &pointwise(CUDNN_POINTWISE_MUL, *scores, &scalar(kScale, CUDNN_DATA_FLOAT), inner());
    if (s_.causal) {
      const auto& masked = scalar(kMasked, CUDNN_DATA_FLOAT);
      scores = &select(*scores, masked, index(*scores, 2), index(*scores, 3), CUDNN_POINTWISE_CMP_GE);  // row ≥ column
      if (s_.window > 0) {
        const auto& row = index(*scores, 2);
        const auto& shifted = pointwise(CUDNN_POINTWISE_ADD, index(*scores, 3), &scalar(kWindow, CUDNN_DATA_FLOAT), inner(), nullptr, CUDNN_DATA_FLOAT, 3);
        scores = &select(*scores, masked, shifted, row, CUDNN_POINTWISE_CMP_GT);                        // column + window > row
      }
    }
    const auto& most = reduce(CUDNN_REDUCE_TENSOR_MAX, *scores);
    const auto& lowered = pointwise(CUDNN_POINTWISE_SUB, *scores, &most, inner());
    const auto& powers = pointwise(CUDNN_POINTWISE_EXP, lowered, nullptr, inner());
    const auto& sums = reduce(CUDNN_REDUCE_TENSOR_ADD, powers);
    const auto& logs = pointwise(CUDNN_POINTWISE_LOG, sums, nullptr, inner(CUDNN_DATA_FLOAT, true));
    pointwise(CUDNN_POINTWISE_ADD, most, &logs, inner(CUDNN_DATA_FLOAT, true));  // the logarithm of the sum, which nobody reads: without it cuDNN sees no flash attention here
    const auto& shares = pointwise(CUDNN_POINTWISE_DIV, powers, &sums, inner(io));                      // the second product's operand
    product(shares, v, out);
  }

  /// Finalized; without a handle for a device that is not here.
  Descriptor whole(cudnnHandle_t handle) const {
    std::vector<cudnnBackendDescriptor_t> raw;
    for (const auto& operation : operations_) raw.push_back(operation.raw());
    Descriptor out(api_, CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR);
    out.set(CUDNN_ATTR_OPERATIONGRAPH_OPS, CUDNN_TYPE_BACKEND_DESCRIPTOR, static_cast<std::int64_t>(raw.size()), raw.data());
    if (handle) out.set(CUDNN_ATTR_OPERATIONGRAPH_HANDLE, CUDNN_TYPE_HANDLE, handle);
    out.finalize("describing attention");
    return out;
  }

 private:
  using Dims = std::vector<std::int64_t>;

  const Descriptor& keep(Descriptor&& descriptor) { return *parts_.emplace_back(std::make_unique<Descriptor>(std::move(descriptor))); }

  const Descriptor& tensor(std::int64_t id, cudnnDataType_t type, const Dims& dims, const Dims& strides, bool inside = false, bool by_value = false) {
    Descriptor out(api_, CUDNN_BACKEND_TENSOR_DESCRIPTOR);
    out.set(CUDNN_ATTR_TENSOR_UNIQUE_ID, CUDNN_TYPE_INT64, id)
        .set(CUDNN_ATTR_TENSOR_DATA_TYPE, CUDNN_TYPE_DATA_TYPE, type)
        .set(CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, CUDNN_TYPE_INT64, std::int64_t{16})
        .set(CUDNN_ATTR_TENSOR_DIMENSIONS, dims)
        .set(CUDNN_ATTR_TENSOR_STRIDES, strides)
        .set(CUDNN_ATTR_TENSOR_IS_VIRTUAL, CUDNN_TYPE_BOOLEAN, inside)
        .set(CUDNN_ATTR_TENSOR_IS_BY_VALUE, CUDNN_TYPE_BOOLEAN, by_value)
        .finalize("describing a tensor");
    return keep(std::move(out));
  }
  const Descriptor& scalar(Id id, cudnnDataType_t type) { return tensor(id, type, {1, 1, 1, 1}, {1, 1, 1, 1}, false, true); }
  /// One that never reaches memory, of the scores' shape or with one column.
  const Descriptor& inner(cudnnDataType_t type = CUDNN_DATA_FLOAT, bool column = false) {
    const auto columns = column ? 1 : s_.keys;
    return tensor(next_++, type, {s_.batch, s_.heads, s_.queries, columns}, {s_.heads * s_.queries * columns, s_.queries * columns, columns, 1}, true);
  }

  void product(const Descriptor& a, const Descriptor& b, const Descriptor& c) {
    Descriptor how(api_, CUDNN_BACKEND_MATMUL_DESCRIPTOR);
    how.set(CUDNN_ATTR_MATMUL_COMP_TYPE, CUDNN_TYPE_DATA_TYPE, CUDNN_DATA_FLOAT).finalize("describing a product");
    operations_.emplace_back(api_, CUDNN_BACKEND_OPERATION_MATMUL_DESCRIPTOR);
    operations_.back().set(CUDNN_ATTR_OPERATION_MATMUL_ADESC, a).set(CUDNN_ATTR_OPERATION_MATMUL_BDESC, b).set(CUDNN_ATTR_OPERATION_MATMUL_CDESC, c)
        .set(CUDNN_ATTR_OPERATION_MATMUL_DESC, keep(std::move(how))).finalize("describing a product");
  }

  /// y = x op b; with `t` it chooses between x and b.
  const Descriptor& pointwise(cudnnPointwiseMode_t mode, const Descriptor& x, const Descriptor* b, const Descriptor& y, const Descriptor* t = nullptr,
                              cudnnDataType_t compute = CUDNN_DATA_FLOAT, std::int64_t axis = -1) {
    Descriptor how(api_, CUDNN_BACKEND_POINTWISE_DESCRIPTOR);
    how.set(CUDNN_ATTR_POINTWISE_MODE, CUDNN_TYPE_POINTWISE_MODE, mode).set(CUDNN_ATTR_POINTWISE_MATH_PREC, CUDNN_TYPE_DATA_TYPE, compute);
    if (axis >= 0) how.set(CUDNN_ATTR_POINTWISE_AXIS, CUDNN_TYPE_INT64, axis);
    how.finalize("describing an operation");
    operations_.emplace_back(api_, CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR);
    auto& operation = operations_.back();
    operation.set(CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR, keep(std::move(how))).set(CUDNN_ATTR_OPERATION_POINTWISE_XDESC, x);
    if (b) operation.set(CUDNN_ATTR_OPERATION_POINTWISE_BDESC, *b);
    if (t) operation.set(CUDNN_ATTR_OPERATION_POINTWISE_TDESC, *t);
    operation.set(CUDNN_ATTR_OPERATION_POINTWISE_YDESC, y).finalize("describing an operation");
    return y;
  }
  const Descriptor& index(const Descriptor& scores, std::int64_t axis) {
    return pointwise(CUDNN_POINTWISE_GEN_INDEX, scores, nullptr, inner(CUDNN_DATA_INT32), nullptr, CUDNN_DATA_FLOAT, axis);
  }
  const Descriptor& select(const Descriptor& scores, const Descriptor& otherwise, const Descriptor& a, const Descriptor& b, cudnnPointwiseMode_t keeps) {
    const auto& seen = pointwise(keeps, a, &b, inner(CUDNN_DATA_BOOLEAN), nullptr, CUDNN_DATA_BOOLEAN);
    return pointwise(CUDNN_POINTWISE_BINARY_SELECT, scores, &otherwise, inner(), &seen);
  }
  const Descriptor& reduce(cudnnReduceTensorOp_t op, const Descriptor& x) {
    Descriptor how(api_, CUDNN_BACKEND_REDUCTION_DESCRIPTOR);
    how.set(CUDNN_ATTR_REDUCTION_OPERATOR, CUDNN_TYPE_REDUCTION_OPERATOR_TYPE, op).set(CUDNN_ATTR_REDUCTION_COMP_TYPE, CUDNN_TYPE_DATA_TYPE, CUDNN_DATA_FLOAT).finalize("describing a reduction");
    const auto& y = inner(CUDNN_DATA_FLOAT, true);
    operations_.emplace_back(api_, CUDNN_BACKEND_OPERATION_REDUCTION_DESCRIPTOR);
    operations_.back().set(CUDNN_ATTR_OPERATION_REDUCTION_XDESC, x).set(CUDNN_ATTR_OPERATION_REDUCTION_YDESC, y)
        .set(CUDNN_ATTR_OPERATION_REDUCTION_DESC, keep(std::move(how))).finalize("describing a reduction");
    return y;
  }

  const Api& api_;
  const AttentionShape& s_;
  std::int64_t next_ = kFirstInner;
  std::vector<std::unique_ptr<Descriptor>> parts_;
  std::vector<Descriptor> operations_;
};

/// Engines that take the graph, the one first that cuDNN guesses to be fastest. `properties`: of the device, where it is not the handle's.
std::vector<Descriptor> engines_for(const Api& api, const Descriptor& graph, const Descriptor* properties) {
  Descriptor guess(api, CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR);
  guess.set(CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH, graph).set(CUDNN_ATTR_ENGINEHEUR_MODE, CUDNN_TYPE_HEUR_MODE, CUDNN_HEUR_MODE_A);
  if (properties) guess.set(CUDNN_ATTR_ENGINEHEUR_DEVICEPROP, *properties);
  guess.finalize("asking for engines");
  std::int64_t offered = 0;
  api.check(api.get(guess.raw(), CUDNN_ATTR_ENGINEHEUR_RESULTS, CUDNN_TYPE_BACKEND_DESCRIPTOR, 0, &offered, nullptr), "asking for engines");
  std::vector<Descriptor> out;
  std::vector<cudnnBackendDescriptor_t> raw;
  for (std::int64_t i = 0; i < offered; ++i) raw.push_back(out.emplace_back(api, CUDNN_BACKEND_ENGINECFG_DESCRIPTOR).raw());
  api.check(api.get(guess.raw(), CUDNN_ATTR_ENGINEHEUR_RESULTS, CUDNN_TYPE_BACKEND_DESCRIPTOR, offered, &offered, raw.data()), "asking for engines");
  out.erase(out.begin() + offered, out.end());
  return out;
}

std::string text_of(const AttentionShape& shape) {
  return fmt::format("attention of {} × {} heads of {} over {} tokens in {}", shape.batch, shape.heads, shape.head_size, shape.keys, shard::name(shape.type));
}

/// The first engine whose kernel can be made.
Descriptor plan_of(const Api& api, const AttentionShape& shape, cudnnHandle_t handle) {
  const AttentionGraph graph(api, shape);
  const auto whole = graph.whole(handle);
  std::string why = "none is offered";
  for (const auto& engine : engines_for(api, whole, nullptr)) {
    Descriptor plan(api, CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR);
    plan.set(CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG, engine).set(CUDNN_ATTR_EXECUTION_PLAN_HANDLE, CUDNN_TYPE_HANDLE, handle);
    const auto status = plan.try_finalize();
    if (status == CUDNN_STATUS_SUCCESS) return plan;
    why = api.reason(status);
  }
  shard::fail(Code::Device, "{}: has no engine for {}: {}", api.library.title(), text_of(shape), why);
}

std::int64_t workspace_of(const Api& api, const Descriptor& plan) {
  std::int64_t out = 0, count = 0;
  api.check(api.get(plan.raw(), CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE, CUDNN_TYPE_INT64, 1, &count, &out), "asking for the workspace");
  return out;
}

}  // namespace

struct FusedAttention::State {
  struct Plan {
    std::string why_not;
    std::unique_ptr<Descriptor> plan;
    DeviceBuffer workspace;
  };

  State(int device, const std::string& path) : api(path) {
    use_device(device);
    api.check(api.create_handle(&handle), "starting");
  }
  ~State() {
    plans.clear();
    if (handle) api.destroy_handle(handle);
  }

  const Plan& plan(const AttentionShape& shape) {
    const auto known = plans.find(shape);
    if (known != plans.end()) return known->second;
    Plan made;
    made.why_not = attention_refusal(shape);
    if (made.why_not.empty()) try {
        made.plan = std::make_unique<Descriptor>(plan_of(api, shape, handle));
        made.workspace = DeviceBuffer(static_cast<std::size_t>(workspace_of(api, *made.plan)));
      } catch (const shard::Error& error) {
        made.why_not = error.what();
        made.plan.reset();
      }
    return plans.emplace(shape, std::move(made)).first->second;
  }

  Api api;
  /// What masked scores become; softmax kernels before 9.10 made NaN of infinities.
  float masked = api.get_version() < 91000 ? std::numeric_limits<float>::lowest() : -std::numeric_limits<float>::infinity();
  cudnnHandle_t handle = nullptr;
  std::map<AttentionShape, Plan> plans;
};

FusedAttention::FusedAttention(int device, const std::string& path) : state_(std::make_unique<State>(device, path)) {}
std::string FusedAttention::why_not(const AttentionShape& shape) { return state_->plan(shape).why_not; }
const std::string& FusedAttention::version() const { return state_->api.version; }

void FusedAttention::operator()(const AttentionShape& shape, const AttentionOperands& operands, StreamView on) {
  auto& s = *state_;
  const auto& plan = s.plan(shape);
  shard::require(plan.why_not.empty(), Code::Device, [&] { return plan.why_not; });
  float scale = operands.scale, masked = s.masked, window = static_cast<float>(shape.window);
  std::vector<std::int64_t> ids{kQ, kK, kV, kOut, kScale};
  std::vector<void*> where{const_cast<std::byte*>(operands.q), const_cast<std::byte*>(operands.k), const_cast<std::byte*>(operands.v), operands.out, &scale};
  if (shape.causal) ids.push_back(kMasked), where.push_back(&masked);
  if (shape.window > 0) ids.push_back(kWindow), where.push_back(&window);
  void* workspace = plan.workspace.data();
  Descriptor pack(s.api, CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR);
  pack.set(CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS, ids)
      .set(CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS, CUDNN_TYPE_VOID_PTR, static_cast<std::int64_t>(where.size()), where.data())
      .set(CUDNN_ATTR_VARIANT_PACK_WORKSPACE, CUDNN_TYPE_VOID_PTR, workspace)
      .finalize("attention");
  s.api.check(s.api.set_stream(s.handle, static_cast<cudaStream_t>(on.handle)), "attention");
  s.api.check(s.api.execute(s.handle, plan.plan->raw(), pack.raw()), "attention");
}

std::size_t attention_engines_for(const AttentionShape& shape, const std::string& device_properties, const std::string& path) {
  const auto refusal = attention_refusal(shape);
  shard::require(refusal.empty(), Code::Device, [&] { return refusal; });
  const Api api(path);
  Descriptor properties(api, CUDNN_BACKEND_DEVICEPROP_DESCRIPTOR);
  properties.set(CUDNN_ATTR_DEVICEPROP_JSON_REPRESENTATION, CUDNN_TYPE_CHAR, static_cast<std::int64_t>(device_properties.size() + 1), device_properties.c_str()).finalize("reading device properties");
  const AttentionGraph graph(api, shape);
  return engines_for(api, graph.whole(nullptr), &properties).size();
}

#else

namespace {

[[noreturn]] void absent() { shard::fail(Code::Device, "cuDNN: this build was made without its header, cudnn_graph.h"); }

}  // namespace

struct FusedAttention::State {
  std::string version;
};
FusedAttention::FusedAttention(int, const std::string&) { absent(); }
std::string FusedAttention::why_not(const AttentionShape&) { absent(); }
const std::string& FusedAttention::version() const { return state_->version; }
void FusedAttention::operator()(const AttentionShape&, const AttentionOperands&, StreamView) { absent(); }
std::size_t attention_engines_for(const AttentionShape&, const std::string&, const std::string&) { absent(); }

#endif

FusedAttention::~FusedAttention() = default;
FusedAttention::FusedAttention(FusedAttention&&) noexcept = default;
FusedAttention& FusedAttention::operator=(FusedAttention&&) noexcept = default;

}  // namespace gpu
