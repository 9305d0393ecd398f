// Room `avx_vnni_evex`: avx_vnni.cc in AVX-512's encoding, for tests on CPUs with AVX-512 VNNI and without AVX-VNNI.
#define BITDISTILL_EVEX
#include "avx_vnni.cc"
