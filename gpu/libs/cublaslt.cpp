// cuBLASLt knows columns, we know rows. A row-major [a, b] with its pitch is a column-major b × a with that leading dimension, so
//   out [t, n] = x [t, k] · w [n, k]ᵀ   is   D (n × t) = op(A) · B   with A = w (k × n, transposed) and B = x (k × t, as it is).
// w [k, n] is n × k and not transposed. The bias runs along D's rows, which are our columns, as its epilogue wants it. This "TN" form is
// also the only one that fp8 has everywhere.
#include "gpu/libs/cublaslt.h"

#include "gpu/libs/library.h"
#include "libshard/error.h"

#if __has_include(<cublasLt.h>)
#include <cublasLt.h>

#include <algorithm>
#include <bit>
#include <map>

namespace gpu {
namespace {

using shard::Code;
using shard::DType;

constexpr std::size_t kLeastVersion = 120000, kLeastForBlocks = 120900;

struct Api {
  explicit Api(const Library& library) {
    library.resolve(version, "cublasLtGetVersion");
    library.resolve(text, "cublasLtGetStatusString");
    library.resolve(create, "cublasLtCreate");
    library.resolve(destroy, "cublasLtDestroy");
    library.resolve(desc_create, "cublasLtMatmulDescCreate");
    library.resolve(desc_destroy, "cublasLtMatmulDescDestroy");
    library.resolve(desc_set, "cublasLtMatmulDescSetAttribute");
    library.resolve(layout_create, "cublasLtMatrixLayoutCreate");
    library.resolve(layout_destroy, "cublasLtMatrixLayoutDestroy");
    library.resolve(layout_set, "cublasLtMatrixLayoutSetAttribute");
    library.resolve(preference_create, "cublasLtMatmulPreferenceCreate");
    library.resolve(preference_destroy, "cublasLtMatmulPreferenceDestroy");
    library.resolve(preference_set, "cublasLtMatmulPreferenceSetAttribute");
    library.resolve(heuristic, "cublasLtMatmulAlgoGetHeuristic");
    library.resolve(matmul, "cublasLtMatmul");
  }
  decltype(&cublasLtGetVersion) version;
  decltype(&cublasLtGetStatusString) text;
  decltype(&cublasLtCreate) create;
  decltype(&cublasLtDestroy) destroy;
  decltype(&cublasLtMatmulDescCreate) desc_create;
  decltype(&cublasLtMatmulDescDestroy) desc_destroy;
  decltype(&cublasLtMatmulDescSetAttribute) desc_set;
  decltype(&cublasLtMatrixLayoutCreate) layout_create;
  decltype(&cublasLtMatrixLayoutDestroy) layout_destroy;
  decltype(&cublasLtMatrixLayoutSetAttribute) layout_set;
  decltype(&cublasLtMatmulPreferenceCreate) preference_create;
  decltype(&cublasLtMatmulPreferenceDestroy) preference_destroy;
  decltype(&cublasLtMatmulPreferenceSetAttribute) preference_set;
  decltype(&cublasLtMatmulAlgoGetHeuristic) heuristic;
  decltype(&cublasLtMatmul) matmul;
};

cudaDataType_t cuda_type(DType type) {
  switch (type) {
    case DType::BF16: return CUDA_R_16BF;
    case DType::F16: return CUDA_R_16F;
    case DType::F32: return CUDA_R_32F;
    case DType::F8E4M3: return CUDA_R_8F_E4M3;
    case DType::F8E5M2: return CUDA_R_8F_E5M2;
    default: shard::fail(Code::Device, "cuBLASLt: {} is no type of a product", shard::name(type));
  }
}

bool is_fp8(DType type) { return type == DType::F8E4M3 || type == DType::F8E5M2; }

std::string text_of(const MatmulShape& shape) {
  return fmt::format("[{}, {}] {} × [{}, {}] {} → {}{}{}", shape.rows, shape.inner, shard::name(shape.type), shape.columns, shape.inner, shard::name(shape.w_type),
                     shard::name(shape.out_type), shape.bias ? " + bias" : "", shape.batch > 1 ? fmt::format(" × {}", shape.batch) : "");
}

/// Bytes that divide an address, as far as algorithms care.
std::uint32_t alignment_of(const void* address) {
  return address ? 1u << std::min(8, std::countr_zero(reinterpret_cast<std::uintptr_t>(address))) : 256;
}

/// What an algorithm may rely on: alignments, and whether fp8's factors are given.
struct Key {
  MatmulShape shape;
  std::uint32_t x, w, out, bias;
  bool x_scaled, w_scaled;
  auto operator<=>(const Key&) const = default;
};

}  // namespace

struct Matmul::State {
  struct Plan {
    cublasLtMatmulDesc_t desc = nullptr;
    cublasLtMatrixLayout_t a = nullptr, b = nullptr, d = nullptr;
    cublasLtMatmulAlgo_t algorithm{};
  };

  State(int device, const std::string& path)
      : library("cuBLASLt", path, {"libcublasLt.so.13", "libcublasLt.so.12", "/usr/local/cuda/lib64/libcublasLt.so.13", "/usr/local/cuda/lib64/libcublasLt.so.12"}),
        api(library), info(device_info(device)) {
    const auto number = api.version();
    version = fmt::format("{}.{}.{}", number / 10000, number / 100 % 100, number % 100);
    shard::require(number >= kLeastVersion, Code::Device, [&] { return fmt::format("{}: is version {}; 12.0 is the least", library.title(), version); });
    use_device(device);
    workspace = DeviceBuffer(kWorkspace);
    check(api.create(&handle), "starting");
  }
  ~State() {
    for (auto& [key, plan] : plans) drop(plan);
    if (handle) api.destroy(handle);
  }

  void check(cublasStatus_t status, std::string_view doing) const {
    shard::require(status == CUBLAS_STATUS_SUCCESS, Code::Device, [&] { return fmt::format("{}: {}: {}", library.title(), doing, api.text(status)); });
  }
  template <typename T>
  void set(cublasLtMatmulDesc_t desc, cublasLtMatmulDescAttributes_t which, const T& value) const {
    check(api.desc_set(desc, which, &value, sizeof value), "describing a product");
  }

  void drop(Plan& plan) const {
    if (plan.desc) api.desc_destroy(plan.desc);
    for (const auto layout : {plan.a, plan.b, plan.d})
      if (layout) api.layout_destroy(layout);
  }

  /// What no product of this device can be; the library would only say "not supported".
  void refuse(const MatmulShape& shape) const {
    const auto good = [&](bool yes, std::string_view why) {
      shard::require(yes, Code::Device, [&] { return fmt::format("{}: {}: {}", library.title(), text_of(shape), why); });
    };
    good(shape.rows > 0 && shape.columns > 0 && shape.inner > 0 && shape.batch > 0, "has no elements");
    good(shape.x_pitch >= shape.inner && shape.out_pitch >= shape.columns && shape.w_pitch >= (shape.w_by_inner ? shape.columns : shape.inner), "rows overlap");
    good(!is_fp8(shape.out_type), "the output cannot be fp8");
    if (!is_fp8(shape.type) && !is_fp8(shape.w_type)) return good(shape.type == shape.w_type, "x and w must have one type");
    good(is_fp8(shape.type) && is_fp8(shape.w_type), "fp8 multiplies only with fp8");
    good(info.major > 8 || (info.major == 8 && info.minor >= 9), fmt::format("fp8 needs compute capability 8.9; {} has {}.{}", info.name, info.major, info.minor));
    good(shape.type == DType::F8E4M3 && shape.w_type == DType::F8E4M3, "f8_e5m2 operands are not supported");  // version 13.1 finds a kernel on H100, and then refuses it
    good(!shape.w_by_inner, "fp8 weights must be stored [n, k]");
    good(shape.inner % 16 == 0 && shape.columns % 16 == 0 && shape.x_pitch % 16 == 0 && shape.w_pitch % 16 == 0, "fp8 needs k, n and pitches that 16 divides");
    good(!shape.bias || shape.out_type != DType::F32, "fp8 with f32 output takes no bias");
    if (!shape.scaled_blocks) return;
    good(info.major == 9, fmt::format("scales of blocks need compute capability 9.0; {} has {}.{}", info.name, info.major, info.minor));
    good(api.version() >= kLeastForBlocks && kKnowsBlocks, fmt::format("scales of blocks need version 12.9, in the library and when this was built; the library is {}", version));
    good(shape.rows % 4 == 0 && shape.inner % 512 == 0 && shape.batch == 1 && !shape.bias, "scales of blocks take rows that 4 and an inner side that 512 divides, one product at a time and no bias");
  }

  cublasLtMatrixLayout_t layout(DType type, std::int64_t rows, std::int64_t columns, std::int64_t pitch, const MatmulShape& shape, std::int64_t step) const {
    cublasLtMatrixLayout_t out = nullptr;
    check(api.layout_create(&out, cuda_type(type), static_cast<std::uint64_t>(rows), static_cast<std::uint64_t>(columns), pitch), "describing a matrix");
    if (shape.batch > 1) {
      const auto count = static_cast<std::int32_t>(shape.batch);
      check(api.layout_set(out, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count, sizeof count), "describing a batch");
      check(api.layout_set(out, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &step, sizeof step), "describing a batch");
    }
    return out;
  }

#if CUBLAS_VERSION >= 120900
  static constexpr bool kKnowsBlocks = true;
  void set_blocks(cublasLtMatmulDesc_t desc) const {
    set(desc, CUBLASLT_MATMUL_DESC_A_SCALE_MODE, CUBLASLT_MATMUL_MATRIX_SCALE_BLK128x128_32F);
    set(desc, CUBLASLT_MATMUL_DESC_B_SCALE_MODE, CUBLASLT_MATMUL_MATRIX_SCALE_VEC128_32F);
  }
#else
  static constexpr bool kKnowsBlocks = false;
  void set_blocks(cublasLtMatmulDesc_t) const {}
#endif

  void set_scales(cublasLtMatmulDesc_t desc, const MatmulOperands& operands) const {
    set(desc, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, static_cast<const void*>(operands.w_scale));
    set(desc, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, static_cast<const void*>(operands.x_scale));
  }

  void choose(const Key& key, const MatmulOperands& operands, Plan& plan) const {
    const auto& shape = key.shape;
    const auto compute = shape.tf32 && shape.type == DType::F32 ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F;
    check(api.desc_create(&plan.desc, compute, CUDA_R_32F), "describing a product");
    set(plan.desc, CUBLASLT_MATMUL_DESC_TRANSA, shape.w_by_inner ? CUBLAS_OP_N : CUBLAS_OP_T);
    set(plan.desc, CUBLASLT_MATMUL_DESC_TRANSB, CUBLAS_OP_N);
    if (shape.bias) {
      set(plan.desc, CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
      set(plan.desc, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, cuda_type(shape.out_type));
      const void* aligned_so = reinterpret_cast<const void*>(std::uintptr_t{key.bias});  // the search reads no more of it
      set(plan.desc, CUBLASLT_MATMUL_DESC_BIAS_POINTER, aligned_so);
    }
    if (is_fp8(shape.type)) set_scales(plan.desc, operands);
    if (shape.scaled_blocks) set_blocks(plan.desc);
    const auto w_rows = shape.w_by_inner ? shape.columns : shape.inner, w_columns = shape.w_by_inner ? shape.inner : shape.columns;
    plan.a = layout(shape.w_type, w_rows, w_columns, shape.w_pitch, shape, shape.w_step);
    plan.b = layout(shape.type, shape.inner, shape.rows, shape.x_pitch, shape, shape.x_step);
    plan.d = layout(shape.out_type, shape.columns, shape.rows, shape.out_pitch, shape, shape.out_step);

    cublasLtMatmulPreference_t made = nullptr;
    check(api.preference_create(&made), "asking for an algorithm");
    const std::unique_ptr<cublasLtMatmulPreferenceOpaque_t, decltype(&cublasLtMatmulPreferenceDestroy)> preference(made, api.preference_destroy);
    const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t which, const auto& value) {
      check(api.preference_set(made, which, &value, sizeof value), "asking for an algorithm");
    };
    prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, std::uint64_t{kWorkspace});
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, key.w);
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, key.x);
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, key.out);
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, key.out);
    cublasLtMatmulHeuristicResult_t found{};
    int count = 0;
    const auto status = api.heuristic(handle, plan.desc, plan.a, plan.b, plan.d, plan.d, made, 1, &found, &count);
    check(status == CUBLAS_STATUS_SUCCESS && count > 0 ? found.state : status == CUBLAS_STATUS_SUCCESS ? CUBLAS_STATUS_NOT_SUPPORTED : status,
          fmt::format("{} on {}", text_of(shape), info.name));
    plan.algorithm = found.algo;
  }

  const Plan& plan_of(const Key& key, const MatmulOperands& operands) {
    const auto known = plans.find(key);
    if (known != plans.end()) return known->second;
    refuse(key.shape);
    Plan fresh;
    try {
      choose(key, operands, fresh);
    } catch (...) {
      drop(fresh);
      throw;
    }
    return plans.emplace(key, fresh).first->second;
  }

  Library library;
  Api api;
  DeviceInfo info;
  std::string version;
  cublasLtHandle_t handle = nullptr;
  DeviceBuffer workspace;
  std::map<Key, Plan> plans;
};

Matmul::Matmul(int device, const std::string& path) : state_(std::make_unique<State>(device, path)) {}

void Matmul::operator()(const MatmulShape& shape, const MatmulOperands& operands, StreamView on) {
  auto& state = *state_;
  const Key key{shape, alignment_of(operands.x), alignment_of(operands.w), alignment_of(operands.out), alignment_of(shape.bias ? operands.bias : nullptr),
                operands.x_scale != nullptr, operands.w_scale != nullptr};
  const auto& plan = state.plan_of(key, operands);
  if (shape.bias) state.set(plan.desc, CUBLASLT_MATMUL_DESC_BIAS_POINTER, static_cast<const void*>(operands.bias));
  if (is_fp8(shape.type)) state.set_scales(plan.desc, operands);
  state.check(state.api.matmul(state.handle, plan.desc, &operands.alpha, operands.w, plan.a, operands.x, plan.b, &operands.beta, operands.out, plan.d, operands.out, plan.d,
                               &plan.algorithm, state.workspace.data(), kWorkspace, static_cast<cudaStream_t>(on.handle)),
              text_of(shape));
}

#else

namespace gpu {

struct Matmul::State {
  std::string version;
};

Matmul::Matmul(int, const std::string&) { shard::fail(shard::Code::Device, "cuBLASLt: this build was made without its header, cublasLt.h"); }
void Matmul::operator()(const MatmulShape&, const MatmulOperands&, StreamView) {}

#endif

Matmul::~Matmul() = default;
Matmul::Matmul(Matmul&&) noexcept = default;
Matmul& Matmul::operator=(Matmul&&) noexcept = default;
const std::string& Matmul::version() const { return state_->version; }

}  // namespace gpu
