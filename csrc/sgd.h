// The element-wise math of the fused update, shared by the CPU loop and the CUDA kernel.
//
//   g' = s*g + wd*w;  v = mu*v + g';  w = w - lr*v   (Nesterov: w = w - lr*(g' + mu*v))
//
// with s the stage's shrinking factor beta^(K-1-k) (FDG, Zhuang et al. 2022). Rounded as
// torch.optim.SGD rounds: its add(x, alpha) is one fused multiply-add, its mul_ and add_ of the
// momentum are two roundings. So the fma's are written out, and files that include this header are
// compiled with contraction off; the bits then depend on neither compiler nor vector width.
// A momentum buffer of zeros makes "first update: v = g'" a case of the general rule.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define FDG_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FDG_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace fdg {

template <class T>
struct SgdCoefficients {
  T shrink;
  T weight_decay;
  T momentum;
  T lr;
};

FDG_HOST_DEVICE float fused_multiply_add(float a, float b, float c) {
  return __builtin_fmaf(a, b, c);
}
FDG_HOST_DEVICE double fused_multiply_add(double a, double b, double c) {
  return __builtin_fma(a, b, c);
}

// Returns the new weight and replaces the momentum `v`. Which rule it is stands in the type, so
// that a loop over elements has no branch. Without momentum (`remembers` is false) torch.optim.SGD
// neither uses nor changes what it remembers.
template <bool nesterov, bool remembers, class T>
FDG_HOST_DEVICE T sgd_step(T w, T g, T& v, const SgdCoefficients<T>& c) {
  const T gradient = fused_multiply_add(w, c.weight_decay, c.shrink * g);
  if (!remembers) return fused_multiply_add(gradient, -c.lr, w);
  v = c.momentum * v + gradient;
  const T direction = nesterov ? fused_multiply_add(v, c.momentum, gradient) : v;
  return fused_multiply_add(direction, -c.lr, w);
}

}  // namespace fdg
