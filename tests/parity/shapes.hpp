#pragma once
// The shapes of the parity tests: first one unusual property at a time, then several together.

#include <vector>

#include "parity/product.hpp"

namespace parity {

const std::vector<Shape>& layer_shapes();      ///< scope = "layer"
const std::vector<Shape>& attention_shapes();  ///< scope = "attention"

}  // namespace parity
