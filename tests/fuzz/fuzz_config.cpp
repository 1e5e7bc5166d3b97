// The TOML loader: parsing, every check, the sweep, and the text it is written back as.

#include "fuzz/target.hpp"
#include "nsa/config/config.hpp"

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  return nsa::fuzz::attempt([&] {
    const nsa::Config config =
        nsa::parse_config({reinterpret_cast<const char*>(data), size}, "fuzz.toml", {"run.seed=7"});
    nsa::validate(config);
    // A config that passed is written as TOML that reads back to the same TOML.
    const std::string text = nsa::to_toml(config);
    if (nsa::to_toml(nsa::parse_config(text, "written.toml", {})) != text) std::abort();
  });
}
