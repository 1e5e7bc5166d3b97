// Memory, streams, events, graphs and properties of one GPU.

#include <dlfcn.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <memory>

#include "kernels/cuda/runtime/clock.cuh"
#include "kernels/cuda/runtime/common.cuh"
#include "kernels/cuda/runtime/cuda.hpp"
#include "kernels/diagnostics/fault_injection.hpp"
#include "kernels/diagnostics/operation_log.hpp"
#include "kernels/interface/backend.hpp"

namespace nsa {

namespace gpu {

const KernelTable& kernel_table();  // kernel_table.cu

namespace {

constexpr std::size_t blas_workspace_bytes = std::size_t{32} << 20;

struct OpenDevice {
  int index = -1;
  DeviceLimits limits;
  cublasHandle_t blas = nullptr;
  void* blas_workspace = nullptr;
  unsigned* arrivals = nullptr;  ///< [branches][max_split_rows]
};
OpenDevice open_device;

cudaEvent_t cuda(Event* event) { return reinterpret_cast<cudaEvent_t>(event); }
cudaGraphExec_t cuda(Graph* graph) { return reinterpret_cast<cudaGraphExec_t>(graph); }
using gpu::cuda;

void* allocate(std::size_t bytes) {
  const Operation operation(OperationKind::wait, "allocate", bytes);
  void* data = nullptr;
  const bool refused = fault::at("device.allocate").is(fault::Action::fail);
  const cudaError_t code = refused ? cudaErrorMemoryAllocation : cudaMalloc(&data, bytes == 0 ? 1 : bytes);
  if (code == cudaErrorMemoryAllocation) {
    (void)cudaGetLastError();
    std::size_t free = 0, total = 0;
    check(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
    throw UserError("out of GPU memory (" + std::to_string(bytes) + " bytes wanted, " + std::to_string(free) + " of " +
                        std::to_string(total) + " free); use more ranks, a shorter context or a smaller batch",
                    ExitCode::device);
  }
  check(code, "cudaMalloc");
  check(cudaMemset(data, 0xFF, bytes), "cudaMemset");
  check(cudaDeviceSynchronize(), "cudaMemset");
  return data;
}

void release(void* data) noexcept { (void)cudaFree(data); }

Stream* create_stream() {
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  return reinterpret_cast<Stream*>(stream);
}
void destroy_stream(Stream* stream) noexcept { (void)cudaStreamDestroy(cuda(stream)); }
void synchronize(Stream* stream) {
  const Operation operation(OperationKind::wait, "device wait");
  check(cudaStreamSynchronize(cuda(stream)), "cudaStreamSynchronize");
}

void copy(void* to, const void* from, std::size_t bytes, Stream* stream) {
  if (bytes > 0) check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, cuda(stream)), "cudaMemcpyAsync");
}
void fill(void* to, int byte, std::size_t bytes, Stream* stream) {
  if (bytes > 0) check(cudaMemsetAsync(to, byte, bytes, cuda(stream)), "cudaMemsetAsync");
}

Event* create_event() {
  cudaEvent_t event = nullptr;
  check(cudaEventCreate(&event), "cudaEventCreate");
  return reinterpret_cast<Event*>(event);
}
void destroy_event(Event* event) noexcept { (void)cudaEventDestroy(cuda(event)); }
void record(Event* event, Stream* stream) { check(cudaEventRecord(cuda(event), cuda(stream)), "cudaEventRecord"); }
void wait(Stream* stream, Event* event) {
  check(cudaStreamWaitEvent(cuda(stream), cuda(event)), "cudaStreamWaitEvent");
}

double elapsed(Event* from, Event* to) {
  const Operation operation(OperationKind::wait, "device wait");
  check(cudaEventSynchronize(cuda(to)), "cudaEventSynchronize");
  float milliseconds = 0;
  check(cudaEventElapsedTime(&milliseconds, cuda(from), cuda(to)), "cudaEventElapsedTime");
  return milliseconds * 1e-3;
}

Graph* capture(Stream* stream, void (*body)(void*), void* context) {
  check(cudaStreamBeginCapture(cuda(stream), cudaStreamCaptureModeRelaxed), "cudaStreamBeginCapture");
  cudaGraph_t graph = nullptr;
  try {
    const CaptureScope capturing;
    body(context);
  } catch (...) {
    (void)cudaStreamEndCapture(cuda(stream), &graph);
    if (graph) (void)cudaGraphDestroy(graph);
    (void)cudaGetLastError();
    throw;
  }
  check(cudaStreamEndCapture(cuda(stream), &graph), "cudaStreamEndCapture");
  cudaGraphExec_t executable = nullptr;
  const cudaError_t code = cudaGraphInstantiate(&executable, graph, 0);
  (void)cudaGraphDestroy(graph);
  check(code, "cudaGraphInstantiate");
  return reinterpret_cast<Graph*>(executable);
}
// A replay is logged as one operation on every rank, whichever exchanges it contains.
void launch(Graph* graph, Stream* stream) {
  const Operation operation(OperationKind::control, "graph launch");
  check(cudaGraphLaunch(cuda(graph), cuda(stream)), "cudaGraphLaunch");
}
void destroy_graph(Graph* graph) noexcept { (void)cudaGraphExecDestroy(cuda(graph)); }

// The driver's management library, opened by name at run time: not every toolkit has its header, and a machine without
// the library only lacks the clocks and the error count.
class Nvml {
 public:
  Nvml() {
    library_ = dlopen("libnvidia-ml.so.1", RTLD_NOW);
    if (!library_) return;
    const auto init = symbol<int (*)()>("nvmlInit_v2");
    const auto find = symbol<int (*)(const char*, void**)>("nvmlDeviceGetHandleByPciBusId_v2");
    char bus[32] = {};
    if (!init || !find || init() != 0) return;
    if (cudaDeviceGetPCIBusId(bus, sizeof bus, open_device.index) != cudaSuccess || find(bus, &device_) != 0)
      device_ = nullptr;
  }
  Nvml(const Nvml&) = delete;
  Nvml& operator=(const Nvml&) = delete;
  ~Nvml() {
    if (!library_) return;
    if (const auto shutdown = symbol<int (*)()>("nvmlShutdown")) shutdown();
    dlclose(library_);
  }
  double clock_mhz(int domain) const {  // 1: SM, 2: memory
    const auto get = symbol<int (*)(void*, int, unsigned*)>("nvmlDeviceGetClockInfo");
    unsigned mhz = 0;
    return get && device_ && get(device_, domain, &mhz) == 0 ? mhz : -1.0;
  }
  double clock_max_mhz() const {
    const auto get = symbol<int (*)(void*, int, unsigned*)>("nvmlDeviceGetMaxClockInfo");
    unsigned mhz = 0;
    return get && device_ && get(device_, 1, &mhz) == 0 ? mhz : 0.0;
  }
  std::int64_t throttle_reasons() const {
    const auto get = symbol<int (*)(void*, unsigned long long*)>("nvmlDeviceGetCurrentClocksThrottleReasons");
    unsigned long long bits = 0;
    return get && device_ && get(device_, &bits) == 0 ? static_cast<std::int64_t>(bits) : -1;
  }
  std::int64_t uncorrected_errors() const {  // since the driver was loaded
    const auto get = symbol<int (*)(void*, int, int, unsigned long long*)>("nvmlDeviceGetTotalEccErrors");
    unsigned long long count = 0;
    return get && device_ && get(device_, 1, 0, &count) == 0 ? static_cast<std::int64_t>(count) : -1;
  }
  std::string driver() const {
    const auto get = symbol<int (*)(char*, unsigned)>("nvmlSystemGetDriverVersion");
    char text[96] = {};
    return get && get(text, sizeof text) == 0 ? text : "";
  }

 private:
  template <class F>
  F symbol(const char* name) const {
    return library_ ? reinterpret_cast<F>(dlsym(library_, name)) : nullptr;
  }
  void* library_ = nullptr;
  void* device_ = nullptr;
};

std::string uuid_text(const cudaUUID_t& uuid) {
  std::string text = "GPU-";
  for (int i = 0; i < 16; ++i) {
    char hex[4];
    std::snprintf(hex, sizeof hex, "%02x", static_cast<unsigned char>(uuid.bytes[i]));
    text += hex;
    if (i == 3 || i == 5 || i == 7 || i == 9) text += '-';
  }
  return text;
}

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

DeviceInfo info() {
  cudaDeviceProp p;
  check(cudaGetDeviceProperties(&p, open_device.index), "cudaGetDeviceProperties");
  int runtime = 0, driver = 0;
  check(cudaRuntimeGetVersion(&runtime), "cudaRuntimeGetVersion");
  check(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
  std::size_t free = 0, total = 0;
  check(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
  static const Nvml nvml;  // opening takes tens of milliseconds, and a point calls info() three times
  DeviceInfo out;
  out.name = p.name;
  out.index = open_device.index;
  out.uuid = uuid_text(p.uuid);
  out.driver = nvml.driver().empty() ? "CUDA " + version_text(driver) : nvml.driver();
  out.runtime = version_text(runtime);
  out.architecture = "sm_" + std::to_string(p.major * 10 + p.minor);
  out.units = p.multiProcessorCount;
  out.memory_total = static_cast<std::int64_t>(total);
  out.memory_free = static_cast<std::int64_t>(free);
  out.clock_mhz = nvml.clock_mhz(1);
  out.memory_clock_mhz = nvml.clock_mhz(2);
  out.clock_max_mhz = nvml.clock_max_mhz();
  out.throttle_reasons = nvml.throttle_reasons();
  out.cache_bytes = p.l2CacheSize;
  out.ecc_errors = nvml.uncorrected_errors();
  return out;
}

#if NSA_FAULTS
__global__ void unlaunchable_kernel() {}

// Launches a kernel with more shared memory than a block may have. The launch also fails during a graph capture.
void refused_launch(Stream* stream) {
  unlaunchable_kernel<<<1, 32, limits().shared_bytes + 1024, cuda(stream)>>>();
  check_launch("a kernel with too much shared memory (by NSA_FAULT)");
}
#else
constexpr void (*refused_launch)(Stream*) = nullptr;
#endif

constexpr DeviceOps device_ops = {
    allocate, release, create_stream, destroy_stream, synchronize,   copy, fill,  create_event, destroy_event, record,
    wait,     elapsed, capture,       launch,         destroy_graph, info, stamp, read_clock,   refused_launch};

void open(int index) {
  if (open_device.index == index) return set_limits(open_device.limits);  // a plan for another GPU may have set them
  const Operation operation(OperationKind::wait, "open device");
  if (open_device.index >= 0)
    throw InternalError("GPU " + std::to_string(index) + " asked for while " + std::to_string(open_device.index) +
                        " is open (one GPU a process)");
  check(cudaSetDevice(index), "cudaSetDevice");
  cudaDeviceProp p;
  check(cudaGetDeviceProperties(&p, index), "cudaGetDeviceProperties");
  open_device.limits = {p.multiProcessorCount, p.major * 10 + p.minor, p.sharedMemPerBlockOptin};
  set_limits(open_device.limits);
  check(cublasCreate(&open_device.blas), "cublasCreate");
  check(cudaMalloc(&open_device.blas_workspace, blas_workspace_bytes), "cudaMalloc");
  constexpr std::size_t arrival_bytes = branches * max_split_rows * sizeof(unsigned);
  check(cudaMalloc(&open_device.arrivals, arrival_bytes), "cudaMalloc");
  check(cudaMemset(open_device.arrivals, 0, arrival_bytes), "cudaMemset");
  open_device.index = index;
}

}  // namespace

void refuse_launch(cudaError_t code, const char* call) {
  (void)cudaGetLastError();  // clears an error that belongs to the call alone
  std::size_t free = 0, total = 0;
  check(cudaMemGetInfo(&free, &total), call);  // throws if the context is lost
  throw LaunchError(std::string(call) + " refused (" + cudaGetErrorString(code) + ")");
}

cublasHandle_t blas(Stream* stream) {
  check(cublasSetStream(open_device.blas, cuda(stream)), "cublasSetStream");
  check(cublasSetWorkspace(open_device.blas, open_device.blas_workspace, blas_workspace_bytes), "cublasSetWorkspace");
  return open_device.blas;
}

unsigned* arrival_counters(Branch branch) { return open_device.arrivals + branch * max_split_rows; }

}  // namespace gpu

Backend open_cuda(int local_rank) {
  int count = 0;
  const cudaError_t code = cudaGetDeviceCount(&count);
  if (code != cudaSuccess || count == 0)
    throw UserError(std::string("no usable GPU (") + (code == cudaSuccess ? "none found" : cudaGetErrorString(code)) +
                        "); check the driver with nvidia-smi, or run with backend = \"host\"",
                    ExitCode::device);
  const char* share = std::getenv("NSA_SHARE_GPU");
  if (local_rank >= count) {
    if (!(share && share[0] == '1'))
      throw UserError(
          "local rank " + std::to_string(local_rank) + " has no GPU of its own (this host has " +
              std::to_string(count) + "); start at most " + std::to_string(count) +
              " ranks a host, or set NSA_SHARE_GPU=1 to try a layout out: ranks then take turns on a GPU, " +
              "and what is timed means nothing",
          ExitCode::device);
    // NCCL accepts two ranks on one GPU only if they seem to be on two hosts.
    char host[256] = "?";
    (void)gethostname(host, sizeof host - 1);
    setenv("NCCL_HOSTID", (std::string(host) + "/" + std::to_string(local_rank / count)).c_str(), 0);
  }
  gpu::open(local_rank % count);
  return {BackendKind::cuda, &gpu::kernel_table(), &gpu::device_ops, gpu::limits().capability};
}

}  // namespace nsa
