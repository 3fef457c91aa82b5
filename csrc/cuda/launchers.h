// The launchers of the CUDA kernels: what Python calls, through bindings.cpp.
//
// Pointers are to device memory, contiguous unless said otherwise; Python has checked shapes,
// dtypes and devices. Launchers check what only they can know, and throw std::runtime_error where a
// launch fails. They work on the current device and return at once.
#pragma once
#include <driver_types.h>

#include <cstdint>

#include "../common/dtype.h"

namespace gptfast::cuda {

// x, y: (n,).
void gelu_fwd(const void* x, void* y, int64_t n, bool tanh_form, DType dtype, cudaStream_t stream);
void gelu_bwd(const void* dy, const void* x, void* dx, int64_t n, bool tanh_form, DType dtype,
              cudaStream_t stream);

// x, y: (M, N). w, b: (N,) or null, in a dtype of their own. mean, rstd: (M,). mean is null for
// RMSNorm, here and in backward. shared_bytes: what a block may use on this card.
void layer_norm_fwd(const void* x, const void* w, DType w_dtype, const void* b, DType b_dtype,
                    void* y, float* mean, float* rstd, int64_t M, int64_t N, float eps,
                    int64_t shared_bytes, DType dtype, cudaStream_t stream);
// dx, dw, db: null where nobody asked. partial: (programs, 2, N), needed for dw and db, each row of
// which sums the rows p, p + programs, ... of x.
void layer_norm_bwd(const void* dy, const void* x, const void* w, DType w_dtype, const float* mean,
                    const float* rstd, void* dx, float* dw, float* db, float* partial,
                    int64_t programs, int64_t M, int64_t N, int64_t shared_bytes, DType dtype,
                    cudaStream_t stream);

// x: (M, V). target: (M,). w: (V,) or null, in its own dtype. loss, lse: (M,). A target that is
// neither in [0, V) nor ignore_index makes its loss NaN. softcap: 0 for none.
void cross_entropy_fwd(const void* x, const int64_t* target, const void* w, DType w_dtype,
                       float* loss, float* lse, int64_t M, int64_t V, int64_t ignore_index,
                       float smoothing, float z_loss, float softcap, DType dtype,
                       cudaStream_t stream);
// w_sum: the sum of w, on the device; null where w is. dx may be x.
void cross_entropy_bwd(const float* dloss, const void* x, const int64_t* target, const void* w,
                       DType w_dtype, const float* w_sum, const float* lse, void* dx, int64_t M,
                       int64_t V, int64_t ignore_index, float smoothing, float z_loss,
                       float softcap, DType dtype, cudaStream_t stream);

}  // namespace gptfast::cuda
