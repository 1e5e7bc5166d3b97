#pragma once
// Catch2 v3 (Ubuntu 24.04) and v2 (Debian 12) behind one name.
#if __has_include(<catch2/catch_all.hpp>)
#include <catch2/catch_all.hpp>
using Catch::Approx;
#else
#include <catch2/catch.hpp>
#endif
