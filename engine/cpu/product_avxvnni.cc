// The products of AVX2 with the dot products of AVX-VNNI.
#include "engine/cpu/product_avx2.h"
