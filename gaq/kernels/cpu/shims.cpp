// C functions of the operations, which files compiled by AOTInductor call. They are linked into the file as a static
// library, so that it runs where GAQ is not installed, also in C++ hosts. See convolution.py, product.py and
// rounding.py.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <omp.h>

#include "signatures.h"

extern "C" {
GAQ_DECLARE_KERNELS(float32, float)
GAQ_DECLARE_KERNELS(float64, double)
}

// A model computes in one dtype: its file carries the kernels of that dtype, and refuses tensors of another.
#if defined(GAQ_ONLY_FLOAT32)
#define GAQ_CALL_OF(DTYPE)                                            \
  if (DTYPE != aoti_torch_dtype_float32()) return AOTI_TORCH_FAILURE; \
  GAQ_CALL(float32, float)
#elif defined(GAQ_ONLY_FLOAT64)
#define GAQ_CALL_OF(DTYPE)                                            \
  if (DTYPE != aoti_torch_dtype_float64()) return AOTI_TORCH_FAILURE; \
  GAQ_CALL(float64, double)
#else
#error "define GAQ_ONLY_FLOAT32 or GAQ_ONLY_FLOAT64"
#endif

namespace {

#define GAQ_CHECK(CALL) \
  if ((CALL) != AOTI_TORCH_SUCCESS) return AOTI_TORCH_FAILURE;

// Data of a tensor. Reading fails for a tensor that is not contiguous; the graph makes all of them contiguous.
struct View {
  void* data = nullptr;
  int64_t* sizes = nullptr;
  int64_t dimensions = 0;
  int32_t dtype = 0;

  AOTITorchError read(AtenTensorHandle tensor) {
    int64_t* strides = nullptr;
    GAQ_CHECK(aoti_torch_get_data_ptr(tensor, &data));
    GAQ_CHECK(aoti_torch_get_dim(tensor, &dimensions));
    GAQ_CHECK(aoti_torch_get_sizes(tensor, &sizes));
    GAQ_CHECK(aoti_torch_get_strides(tensor, &strides));
    GAQ_CHECK(aoti_torch_get_dtype(tensor, &dtype));
    int64_t expected = 1;
    for (int64_t i = dimensions - 1; i >= 0; --i) {
      if (sizes[i] > 1 && strides[i] != expected) return AOTI_TORCH_FAILURE;
      expected *= sizes[i];
    }
    return AOTI_TORCH_SUCCESS;
  }
  // Data of a tensor that may be left out; null if it is empty.
  void* optional() const { return sizes[0] == 0 ? nullptr : data; }
  int64_t bytes() const {
    int64_t count = dtype == aoti_torch_dtype_float64() ? 8 : 4;
    for (int64_t i = 0; i < dimensions; ++i) count *= sizes[i];
    return count;
  }
};

// Allocates a contiguous tensor of up to 4 dimensions.
AOTITorchError make(int64_t dimensions, const int64_t* sizes, int32_t dtype, AtenTensorHandle* tensor, View* view) {
  int64_t strides[4] = {1, 1, 1, 1};
  for (int64_t i = dimensions - 2; i >= 0; --i) strides[i] = strides[i + 1] * sizes[i + 1];
  GAQ_CHECK(aoti_torch_empty_strided(dimensions, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, tensor));
  return view->read(*tensor);
}

}  // namespace

extern "C" {

GAQ_SHIM(edge_convolution) {
  View h, r, w, f, i, d, s, t, k, out;
  GAQ_CHECK(h.read(features));
  GAQ_CHECK(r.read(vectors));
  GAQ_CHECK(w.read(weights));
  GAQ_CHECK(f.read(scales));
  GAQ_CHECK(i.read(ints));
  GAQ_CHECK(d.read(reals));
  GAQ_CHECK(s.read(sender));
  GAQ_CHECK(t.read(receiver));
  GAQ_CHECK(k.read(tables));
  const int64_t sizes[2] = {rows_out * receivers, h.sizes[2]};
  GAQ_CHECK(make(2, sizes, h.dtype, ret0, &out));
#define GAQ_CALL(NAME, T)                                                                                       \
  gaq_convolution_##NAME((const int64_t*)i.data, (const double*)d.data, h.sizes[0], receivers, s.sizes[0],      \
                         (const int64_t*)s.data, (const int64_t*)t.data, (const int64_t*)k.optional(),          \
                         (const T*)r.data, (const T*)h.data, (const T*)w.data, (const T*)f.optional(), nullptr, \
                         (T*)out.data, omp_get_max_threads());
  GAQ_CALL_OF(h.dtype)
#undef GAQ_CALL
  return AOTI_TORCH_SUCCESS;
}

GAQ_SHIM(edge_convolution_backward) {
  View g, h, r, w, f, i, d, s, t, k, gh, gr, gw, gf;
  GAQ_CHECK(g.read(grad));
  GAQ_CHECK(h.read(features));
  GAQ_CHECK(r.read(vectors));
  GAQ_CHECK(w.read(weights));
  GAQ_CHECK(f.read(scales));
  GAQ_CHECK(i.read(ints));
  GAQ_CHECK(d.read(reals));
  GAQ_CHECK(s.read(sender));
  GAQ_CHECK(t.read(receiver));
  GAQ_CHECK(k.read(tables));
  const int64_t none[1] = {0};
  GAQ_CHECK(of_features ? make(h.dimensions, h.sizes, h.dtype, ret0, &gh) : make(1, none, h.dtype, ret0, &gh));
  GAQ_CHECK(make(r.dimensions, r.sizes, r.dtype, ret1, &gr));
  GAQ_CHECK(of_weights ? make(w.dimensions, w.sizes, w.dtype, ret2, &gw) : make(1, none, w.dtype, ret2, &gw));
  GAQ_CHECK(make(f.dimensions, f.sizes, h.dtype, ret3, &gf));
  if (of_features) std::memset(gh.data, 0, gh.bytes());
  std::memset(gr.data, 0, gr.bytes());
  if (of_weights) std::memset(gw.data, 0, gw.bytes());
  if (gf.optional()) std::memset(gf.data, 0, gf.bytes());
#define GAQ_CALL(NAME, T)                                                                                           \
  gaq_convolution_backward_##NAME((const int64_t*)i.data, (const double*)d.data, h.sizes[0], receivers, s.sizes[0], \
                                  (const int64_t*)s.data, (const int64_t*)t.data, (const int64_t*)k.optional(),     \
                                  (const T*)r.data, (const T*)h.data, (const T*)w.data, (const T*)f.optional(),     \
                                  nullptr, (const T*)g.data, (T*)gr.data, of_features ? (T*)gh.data : nullptr,      \
                                  of_weights ? (T*)gw.data : nullptr, (T*)gf.optional(), omp_get_max_threads());
  GAQ_CALL_OF(h.dtype)
#undef GAQ_CALL
  return AOTI_TORCH_SUCCESS;
}

GAQ_SHIM(edge_product) {
  View v, u, w, i, d, a, out;
  GAQ_CHECK(v.read(x));
  GAQ_CHECK(u.read(y));
  GAQ_CHECK(w.read(weights));
  GAQ_CHECK(i.read(ints));
  GAQ_CHECK(d.read(reals));
  GAQ_CHECK(a.read(centre));
  const int64_t sizes[3] = {v.sizes[0], v.sizes[1], rows_out};
  GAQ_CHECK(make(3, sizes, v.dtype, ret0, &out));
#define GAQ_CALL(NAME, T)                                                                                           \
  gaq_product_##NAME((const int64_t*)i.data, (const double*)d.data, u.sizes[0], a.sizes[0], (const int64_t*)a.data, \
                     (const T*)v.data, (const T*)u.data, (const T*)w.data, (T*)out.data, omp_get_max_threads());
  GAQ_CALL_OF(v.dtype)
#undef GAQ_CALL
  return AOTI_TORCH_SUCCESS;
}

GAQ_SHIM(edge_product_backward) {
  View g, v, u, w, i, d, a, gv, gu;
  GAQ_CHECK(g.read(grad));
  GAQ_CHECK(v.read(x));
  GAQ_CHECK(u.read(y));
  GAQ_CHECK(w.read(weights));
  GAQ_CHECK(i.read(ints));
  GAQ_CHECK(d.read(reals));
  GAQ_CHECK(a.read(centre));
  GAQ_CHECK(make(v.dimensions, v.sizes, v.dtype, ret0, &gv));
  GAQ_CHECK(make(u.dimensions, u.sizes, u.dtype, ret1, &gu));
#define GAQ_CALL(NAME, T)                                                                                   \
  gaq_product_backward_##NAME((const int64_t*)i.data, (const double*)d.data, u.sizes[0], a.sizes[0],        \
                              (const int64_t*)a.data, (const T*)v.data, (const T*)u.data, (const T*)w.data, \
                              (const T*)g.data, (T*)gv.data, (T*)gu.data, omp_get_max_threads());
  GAQ_CALL_OF(v.dtype)
#undef GAQ_CALL
  return AOTI_TORCH_SUCCESS;
}

GAQ_SHIM(rounded) {
  View x, i, d, out;
  GAQ_CHECK(x.read(features));
  GAQ_CHECK(i.read(ints));
  GAQ_CHECK(d.read(reals));
  GAQ_CHECK(make(x.dimensions, x.sizes, x.dtype, ret0, &out));
  std::memcpy(out.data, x.data, x.bytes());
  // With few features, threads cost more time than they save.
  const int64_t element = x.dtype == aoti_torch_dtype_float64() ? 8 : 4;
  const int64_t threads = std::min<int64_t>(omp_get_max_threads(), 1 + x.bytes() / element / (1 << 15));
#define GAQ_CALL(NAME, T) \
  gaq_round_##NAME((const int64_t*)i.data, (const double*)d.data, x.sizes[0], (const T*)x.data, (T*)out.data, threads);
  GAQ_CALL_OF(x.dtype)
#undef GAQ_CALL
  return AOTI_TORCH_SUCCESS;
}
}
