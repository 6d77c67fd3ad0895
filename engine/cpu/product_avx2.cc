#include "engine/cpu/product_avx2.h"
