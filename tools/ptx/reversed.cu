// A kernel for test_ptx_executor.py: every 64 numbers in reverse order, and 1000 more.
struct Params { const int* given; int* out; int count; };
extern "C" __global__ void __launch_bounds__(64) reversed(Params p) {
  extern __shared__ int memory[];
  int i = blockIdx.x * 64 + threadIdx.x;
  memory[threadIdx.x] = p.given[i];
  __syncthreads();
  if (i < p.count) p.out[i] = memory[63 - threadIdx.x] + 1000;
}
