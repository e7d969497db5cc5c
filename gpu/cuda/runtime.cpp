// The runtime over CUDA's, linked statically: the driver is loaded by the first call and its absence is an answer.
#include "gpu/runtime.h"

#include "gpu/architectures.h"
#include "gpu/cuda/check.h"

#include <string_view>

namespace gpu {
namespace {

thread_local int chosen = -1;  ///< by use_device(); CUDA itself says 0 of a thread that never chose, and going back there would take a context on it

cudaStream_t raw(StreamView stream) { return static_cast<cudaStream_t>(stream.handle); }

/// As nvidia-smi writes it.
std::string text_of(const cudaUUID_t& id) {
  std::string out = "GPU";
  for (int i = 0; i < 16; ++i) out += fmt::format("{}{:02x}", i == 0 || i == 4 || i == 6 || i == 8 || i == 10 ? "-" : "", static_cast<unsigned char>(id.bytes[i]));
  return out;
}

/// All but its free memory, which would take a context there.
DeviceInfo described(int index) {
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, index), "asking for a device");
  return {index, properties.name, properties.major, properties.minor, properties.multiProcessorCount, properties.totalGlobalMem, 0, text_of(properties.uuid)};
}

}  // namespace

DeviceInfo device_info(int index) {
  auto out = described(index);
  check(cudaSetDevice(index), "choosing a device");
  std::size_t free = 0, all = 0;
  const auto status = cudaMemGetInfo(&free, &all);
  if (chosen >= 0) check(cudaSetDevice(chosen), "choosing a device");
  check(status, "asking for free memory");
  out.free = free;
  return out;
}

Probe probe() {
  Probe out;
  int driver = 0, count = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) {
    cudaGetLastError();
    out.why = "no NVIDIA driver was found";
    return out;
  }
  if (const auto status = cudaGetDeviceCount(&count); status != cudaSuccess) {
    cudaGetLastError();
    out.why = status == cudaErrorInsufficientDriver
                  ? fmt::format("the driver is for CUDA {}.{}; this build needs {}.{}", driver / 1000, driver % 1000 / 10, CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10)
                  : fmt::format("driver found, but {}", cudaGetErrorString(status));
    return out;
  }
  for (int i = 0; i < count; ++i) {
    try {
      const auto info = described(i);
      if (has_code(SHARDKIT_CUDA_ARCHITECTURES, info.major, info.minor)) out.devices.push_back(info);
      else out.refused[i] = fmt::format("device {} ({}) has compute capability {}.{}; this build has code for {}", i, info.name, info.major, info.minor, SHARDKIT_CUDA_ARCHITECTURES);
    } catch (const shard::Error& error) {
      out.refused[i] = fmt::format("device {}: {}", i, error.what());
    }
  }
  if (out.devices.empty() && !out.refused.empty()) out.why = out.refused.begin()->second;
  if (out.devices.empty() && out.why.empty()) out.why = "driver found, no device visible";
  return out;
}

bool is_emulated() { return false; }

bool has_warpgroups() {
  static const bool built = std::string_view(SHARDKIT_CUDA_ARCHITECTURES).find("90a") != std::string_view::npos;
  int device = 0, major = 0, minor = 0;
  check(cudaGetDevice(&device), "asking for a device");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "asking for a device");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "asking for a device");
  return built && major == 9 && minor == 0;
}

void use_device(int index) {
  check(cudaSetDevice(index), "choosing a device");
  chosen = index;
}

Stream::Stream() {
  cudaStream_t made;
  check(cudaStreamCreateWithFlags(&made, cudaStreamNonBlocking), "making a stream");
  handle_ = made;
}
Stream::~Stream() { cudaStreamDestroy(static_cast<cudaStream_t>(handle_)); }
void Stream::wait() const { gpu::wait(*this); }
void wait(StreamView stream) { check(cudaStreamSynchronize(raw(stream)), "waiting for a stream"); }
bool done(StreamView stream) {
  const auto status = cudaStreamQuery(raw(stream));
  if (status == cudaErrorNotReady) cudaGetLastError();  // no failure that the next launch should be told of
  else check(status, "asking for a stream");
  return status == cudaSuccess;
}

Event::Event() {
  cudaEvent_t made;
  check(cudaEventCreate(&made), "making an event");
  handle_ = made;
}
Event::~Event() { cudaEventDestroy(static_cast<cudaEvent_t>(handle_)); }
void Event::record(StreamView on) { check(cudaEventRecord(static_cast<cudaEvent_t>(handle_), raw(on)), "recording an event"); }
void Event::hold(StreamView stream) const { check(cudaStreamWaitEvent(raw(stream), static_cast<cudaEvent_t>(handle_), 0), "ordering streams"); }
void Event::wait() const { check(cudaEventSynchronize(static_cast<cudaEvent_t>(handle_)), "waiting for an event"); }
float Event::since(const Event& start) const {
  float out = 0;
  check(cudaEventElapsedTime(&out, static_cast<cudaEvent_t>(start.handle_), static_cast<cudaEvent_t>(handle_)), "timing");
  return out;
}

DeviceBuffer::DeviceBuffer(std::size_t bytes) : size_(bytes) {
  if (bytes == 0) return;
  void* made = nullptr;
  if (const auto status = cudaMalloc(&made, bytes); status == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    std::size_t free = 0, all = 0;
    cudaMemGetInfo(&free, &all);
    shard::fail(shard::Code::Device, "device: out of memory: {} bytes are asked for, {} of {} are free", bytes, free, all);
  } else {
    check(status, "taking memory");
  }
  memory_ = {static_cast<std::byte*>(made), [](std::byte* memory) { cudaFree(memory); }};
}

PinnedBuffer::PinnedBuffer(std::size_t bytes) : size_(bytes) {
  if (bytes == 0) return;
  void* made = nullptr;
  check(cudaHostAlloc(&made, bytes, cudaHostAllocPortable), "pinning memory");
  memory_ = {static_cast<std::byte*>(made), [](std::byte* memory) { cudaFreeHost(memory); }};
}

void to_device(std::byte* to, const void* from, std::size_t bytes, StreamView on) {
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, raw(on)), "copying to the device");
}
void to_host(void* to, const std::byte* from, std::size_t bytes, StreamView on) {
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, raw(on)), "copying from the device");
}
void on_device(std::byte* to, const std::byte* from, std::size_t bytes, StreamView on) {
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, raw(on)), "copying on the device");
}
void set_bytes(std::byte* to, int value, std::size_t bytes, StreamView on) { check(cudaMemsetAsync(to, value, bytes, raw(on)), "filling memory"); }

// Relaxed: what is recorded may take memory, which happens at once.
void Graph::begin(StreamView on) { check(cudaStreamBeginCapture(raw(on), cudaStreamCaptureModeRelaxed), "recording a graph"); }
Graph Graph::end(StreamView on) {
  cudaGraph_t recorded;
  check(cudaStreamEndCapture(raw(on), &recorded), "recording a graph");
  cudaGraphExec_t made;
  const auto status = cudaGraphInstantiate(&made, recorded, 0);
  cudaGraphDestroy(recorded);
  check(status, "making a graph");
  Graph out;
  out.handle_ = {made, [](void* graph) { cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(graph)); }};
  return out;
}
void Graph::launch(StreamView on) const { check(cudaGraphLaunch(static_cast<cudaGraphExec_t>(handle_.get()), raw(on)), "launching a graph"); }

}  // namespace gpu
