// The largest of many numbers, and the sum of their exponentials: what drafting and its training
// ask of logits. Neither ever touches the text.
#pragma once

#include <cstdint>

namespace chimera {

// Indices of the k largest of x, largest first, of equal ones the lower index first. Returns how
// many there are: k, or n if that is less. Where x holds NaN, some of them.
int top_k(const float* x, int64_t n, int k, int32_t* index);

// Sum over i of exp((x[i] - shift) * scale), to 1e-5 of it, for x[i] <= shift.
float sum_of_exp(const float* x, int64_t n, float shift, float scale);

}  // namespace chimera
