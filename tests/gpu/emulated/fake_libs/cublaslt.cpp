// cuBLASLt's documented meaning on host memory, for the entry points that gpu/libs/cublaslt.cpp calls: column-major matrices with leading
// dimensions, transposes, strided batches, the bias epilogue, alpha and beta, fp8 scales; and what it refuses.
#include "tests/gpu/emulated/fake_libs/fake.h"

#include "libshard/float_bits.h"

#include <cublasLt.h>

#include <atomic>
#include <cstring>

FakeEnqueue fake_enqueue = nullptr;
FakeWait fake_wait = nullptr;  // a product waits for nobody
/// Searches and descriptors made so far: a product seen before makes none.
extern "C" __attribute__((visibility("default"))) std::atomic<int> fake_made;
std::atomic<int> fake_made = 0;

namespace {

struct Desc {
  cublasComputeType_t compute;
  cublasOperation_t transa = CUBLAS_OP_N, transb = CUBLAS_OP_N;
  cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_DEFAULT;
  const void *bias = nullptr, *a_scale = nullptr, *b_scale = nullptr;
  cudaDataType_t bias_type = static_cast<cudaDataType_t>(-1);
  cublasLtMatmulMatrixScale_t a_mode = CUBLASLT_MATMUL_MATRIX_SCALE_SCALAR_32F, b_mode = CUBLASLT_MATMUL_MATRIX_SCALE_SCALAR_32F;
  bool blocks() const { return a_mode == CUBLASLT_MATMUL_MATRIX_SCALE_BLK128x128_32F; }
};
struct Layout {
  cudaDataType_t type;
  std::int64_t rows, columns, pitch, step = 0;
  std::int32_t batch = 1;
};
struct Preference {
  std::uint64_t workspace = 0;
  std::uint32_t a = 256, b = 256, c = 256, d = 256;
};
/// What the search promises, kept in the algorithm's opaque words.
struct Promise {
  std::int64_t m, n, k;
  std::uint32_t a, b, d, types;
  std::uint64_t workspace;
  std::uint64_t rest[2];
};
static_assert(sizeof(Promise) == sizeof(cublasLtMatmulAlgo_t));

Desc& of(cublasLtMatmulDesc_t desc) { return *reinterpret_cast<Desc*>(desc); }
const Layout& of(cublasLtMatrixLayout_t layout) { return *reinterpret_cast<Layout*>(layout); }

int size_of(cudaDataType_t type) {
  switch (type) {
    case CUDA_R_32F: return 4;
    case CUDA_R_16F: case CUDA_R_16BF: return 2;
    case CUDA_R_8F_E4M3: case CUDA_R_8F_E5M2: return 1;
    default: return 0;
  }
}
bool is_fp8(cudaDataType_t type) { return size_of(type) == 1; }

float read(const void* base, std::int64_t at, cudaDataType_t type) {
  const auto* from = static_cast<const std::byte*>(base) + at * size_of(type);
  switch (type) {
    case CUDA_R_32F: return shard::load<float>(from);
    case CUDA_R_16F: return std::bit_cast<float>(shard::widen<shard::kF16>(shard::load<std::uint16_t>(from)));
    case CUDA_R_16BF: return std::bit_cast<float>(shard::widen<shard::kBF16>(shard::load<std::uint16_t>(from)));
    case CUDA_R_8F_E4M3: return std::bit_cast<float>(shard::widen<shard::kE4M3>(shard::load<std::uint8_t>(from)));
    default: return std::bit_cast<float>(shard::widen<shard::kE5M2>(shard::load<std::uint8_t>(from)));
  }
}
void write(void* base, std::int64_t at, cudaDataType_t type, float value) {
  auto* to = static_cast<std::byte*>(base) + at * size_of(type);
  const auto bits = std::bit_cast<std::uint32_t>(value);
  if (type == CUDA_R_32F) shard::store(to, value);
  else if (type == CUDA_R_16F) shard::store(to, static_cast<std::uint16_t>(shard::narrow<shard::kF16>(bits)));
  else shard::store(to, static_cast<std::uint16_t>(shard::narrow<shard::kBF16>(bits)));
}
/// TF32 has ten bits of mantissa.
float as_tf32(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  return std::bit_cast<float>((bits + 0xfff + (bits >> 13 & 1)) & ~0x1fffu);
}

bool aligned(const void* address, std::uint32_t to) { return reinterpret_cast<std::uintptr_t>(address) % to == 0; }
std::uint32_t types_of(const Layout& a, const Layout& b, const Layout& d) {
  return static_cast<std::uint32_t>(a.type) | static_cast<std::uint32_t>(b.type) << 10 | static_cast<std::uint32_t>(d.type) << 20;
}

cublasStatus_t check(const Desc& desc, const Layout& a, const Layout& b, const Layout& d) {
  const bool ta = desc.transa == CUBLAS_OP_T, tb = desc.transb == CUBLAS_OP_T;
  const auto m = ta ? a.columns : a.rows, k = ta ? a.rows : a.columns, n = tb ? b.rows : b.columns;
  if ((tb ? b.columns : b.rows) != k || d.rows != m || d.columns != n) return CUBLAS_STATUS_INVALID_VALUE;
  for (const auto& layout : {a, b, d})
    if (layout.pitch < layout.rows || layout.batch != d.batch) return CUBLAS_STATUS_INVALID_VALUE;
  if (size_of(a.type) == 0 || size_of(b.type) == 0 || size_of(d.type) < 2) return CUBLAS_STATUS_NOT_SUPPORTED;
  if (is_fp8(a.type) != is_fp8(b.type) || (!is_fp8(a.type) && a.type != b.type)) return CUBLAS_STATUS_NOT_SUPPORTED;
  if (is_fp8(a.type) && (!ta || tb || m % 16 || k % 16 || a.pitch % 16 || b.pitch % 16 || (a.type == CUDA_R_8F_E5M2 && b.type == CUDA_R_8F_E5M2))) return CUBLAS_STATUS_NOT_SUPPORTED;
  if (a.type == CUDA_R_32F && d.type != CUDA_R_32F) return CUBLAS_STATUS_NOT_SUPPORTED;
  if ((a.type == CUDA_R_16F && d.type == CUDA_R_16BF) || (a.type == CUDA_R_16BF && d.type == CUDA_R_16F)) return CUBLAS_STATUS_NOT_SUPPORTED;
  if (desc.blocks() != (desc.b_mode == CUBLASLT_MATMUL_MATRIX_SCALE_VEC128_32F) || (desc.blocks() && (!is_fp8(a.type) || n % 4 || !aligned(desc.a_scale, 16) || !aligned(desc.b_scale, 16))))
    return CUBLAS_STATUS_NOT_SUPPORTED;
  if (desc.epilogue == CUBLASLT_EPILOGUE_BIAS && desc.bias_type != d.type) return CUBLAS_STATUS_NOT_SUPPORTED;
  return CUBLAS_STATUS_SUCCESS;
}

template <typename T>
cublasStatus_t take(T& into, const void* from, std::size_t size) {
  if (size != sizeof(T)) return CUBLAS_STATUS_INVALID_VALUE;
  std::memcpy(&into, from, size);
  return CUBLAS_STATUS_SUCCESS;
}

}  // namespace

extern "C" {

std::size_t cublasLtGetVersion() { return 130000; }
const char* cublasLtGetStatusString(cublasStatus_t status) {
  return status == CUBLAS_STATUS_INVALID_VALUE ? "an unsupported value or parameter" : status == CUBLAS_STATUS_NOT_SUPPORTED ? "not supported" : "another failure";
}
cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) {
  *handle = reinterpret_cast<cublasLtHandle_t>(new int(0));
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) {
  delete reinterpret_cast<int*>(handle);
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* desc, cublasComputeType_t compute, cudaDataType_t scale) {
  if (scale != CUDA_R_32F) return CUBLAS_STATUS_NOT_SUPPORTED;
  ++fake_made;
  *desc = reinterpret_cast<cublasLtMatmulDesc_t>(new Desc{compute});
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t desc) {
  delete &of(desc);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t desc, cublasLtMatmulDescAttributes_t which, const void* from, std::size_t size) {
  switch (which) {
    case CUBLASLT_MATMUL_DESC_TRANSA: return take(of(desc).transa, from, size);
    case CUBLASLT_MATMUL_DESC_TRANSB: return take(of(desc).transb, from, size);
    case CUBLASLT_MATMUL_DESC_EPILOGUE: return take(of(desc).epilogue, from, size);
    case CUBLASLT_MATMUL_DESC_BIAS_POINTER: return take(of(desc).bias, from, size);
    case CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE: return take(of(desc).bias_type, from, size);
    case CUBLASLT_MATMUL_DESC_A_SCALE_POINTER: return take(of(desc).a_scale, from, size);
    case CUBLASLT_MATMUL_DESC_B_SCALE_POINTER: return take(of(desc).b_scale, from, size);
    case CUBLASLT_MATMUL_DESC_A_SCALE_MODE: return take(of(desc).a_mode, from, size);
    case CUBLASLT_MATMUL_DESC_B_SCALE_MODE: return take(of(desc).b_mode, from, size);
    default: return CUBLAS_STATUS_INVALID_VALUE;
  }
}

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* layout, cudaDataType_t type, std::uint64_t rows, std::uint64_t columns, std::int64_t pitch) {
  ++fake_made;
  *layout = reinterpret_cast<cublasLtMatrixLayout_t>(new Layout{type, static_cast<std::int64_t>(rows), static_cast<std::int64_t>(columns), pitch});
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) {
  delete &of(layout);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t layout, cublasLtMatrixLayoutAttribute_t which, const void* from, std::size_t size) {
  auto& mine = *reinterpret_cast<Layout*>(layout);
  if (which == CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT) return take(mine.batch, from, size);
  if (which == CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET) return take(mine.step, from, size);
  return CUBLAS_STATUS_INVALID_VALUE;
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* preference) {
  *preference = reinterpret_cast<cublasLtMatmulPreference_t>(new Preference);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) {
  delete reinterpret_cast<Preference*>(preference);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference, cublasLtMatmulPreferenceAttributes_t which, const void* from, std::size_t size) {
  auto& mine = *reinterpret_cast<Preference*>(preference);
  switch (which) {
    case CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES: return take(mine.workspace, from, size);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES: return take(mine.a, from, size);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES: return take(mine.b, from, size);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES: return take(mine.c, from, size);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES: return take(mine.d, from, size);
    default: return CUBLAS_STATUS_INVALID_VALUE;
  }
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t desc, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t,
                                              cublasLtMatrixLayout_t d, cublasLtMatmulPreference_t preference, int, cublasLtMatmulHeuristicResult_t* results, int* count) {
  ++fake_made;
  *count = 0;
  const auto status = check(of(desc), of(a), of(b), of(d));
  if (status != CUBLAS_STATUS_SUCCESS) return status;
  const auto& asked = *reinterpret_cast<Preference*>(preference);
  if (asked.workspace < 1024) return CUBLAS_STATUS_NOT_SUPPORTED;
  const Promise promise{of(d).rows, of(d).columns, of(a).rows * of(a).columns / of(d).rows, asked.a, asked.b, asked.d, types_of(of(a), of(b), of(d)), 1024, {}};
  std::memcpy(&results[0].algo, &promise, sizeof promise);
  results[0].state = CUBLAS_STATUS_SUCCESS;
  results[0].workspaceSize = promise.workspace;
  *count = 1;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t desc, const void* alpha, const void* a, cublasLtMatrixLayout_t a_layout, const void* b, cublasLtMatrixLayout_t b_layout,
                              const void* beta, const void* c, cublasLtMatrixLayout_t c_layout, void* d, cublasLtMatrixLayout_t d_layout, const cublasLtMatmulAlgo_t* algorithm,
                              void* workspace, std::size_t workspace_size, cudaStream_t stream) {
  const Desc how = of(desc);
  const Layout la = of(a_layout), lb = of(b_layout), lc = of(c_layout), ld = of(d_layout);
  if (const auto status = check(how, la, lb, ld); status != CUBLAS_STATUS_SUCCESS) return status;
  Promise promise;
  std::memcpy(&promise, algorithm, sizeof promise);
  const bool ta = how.transa == CUBLAS_OP_T, tb = how.transb == CUBLAS_OP_T;
  const auto k = ta ? la.rows : la.columns;
  const bool kept = promise.m == ld.rows && promise.n == ld.columns && promise.k == k && promise.types == types_of(la, lb, ld) && workspace_size >= promise.workspace &&
                    workspace && aligned(a, promise.a) && aligned(b, promise.b) && aligned(d, promise.d);
  const bool biased = how.epilogue == CUBLASLT_EPILOGUE_BIAS;
  if (!kept || (biased && !how.bias)) return CUBLAS_STATUS_INVALID_VALUE;
  const float by = *static_cast<const float*>(alpha), more = *static_cast<const float*>(beta);
  fake_enqueue(stream, [=] {
    const float scale = how.blocks() ? by : by * (how.a_scale ? *static_cast<const float*>(how.a_scale) : 1) * (how.b_scale ? *static_cast<const float*>(how.b_scale) : 1);
    const bool tf32 = how.compute == CUBLAS_COMPUTE_32F_FAST_TF32;
    for (std::int64_t batch = 0; batch < ld.batch; ++batch)
      for (std::int64_t column = 0; column < ld.columns; ++column)
        for (std::int64_t row = 0; row < ld.rows; ++row) {
          float sum = 0;
          for (std::int64_t i = 0; i < k; ++i) {
            auto x = read(a, batch * la.step + (ta ? row * la.pitch + i : i * la.pitch + row), la.type);
            auto y = read(b, batch * lb.step + (tb ? i * lb.pitch + column : column * lb.pitch + i), lb.type);
            if (tf32) x = as_tf32(x), y = as_tf32(y);
            if (how.blocks()) {  // K-major in columns of a multiple of 4, and N-major
              const auto column_of_scales = ((k + 127) / 128 + 3) / 4 * 4;
              x *= static_cast<const float*>(how.a_scale)[row / 128 * column_of_scales + i / 128];
              y *= static_cast<const float*>(how.b_scale)[i / 128 * ld.columns + column];
            }
            sum += x * y;
          }
          float out = scale * sum;
          if (more != 0) out += more * read(c, batch * lc.step + column * lc.pitch + row, lc.type);
          if (biased) out += read(how.bias, row, how.bias_type);
          write(d, batch * ld.step + column * ld.pitch + row, ld.type, out);
        }
  });
  return CUBLAS_STATUS_SUCCESS;
}

}  // extern "C"
