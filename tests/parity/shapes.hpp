#pragma once
// The shapes that parity is shown on: one thing unusual at a time, then together.

#include <vector>

#include "parity/product.hpp"

namespace parity {

const std::vector<Shape>& layer_shapes();      ///< scope = "layer"
const std::vector<Shape>& attention_shapes();  ///< scope = "attention"

}  // namespace parity
