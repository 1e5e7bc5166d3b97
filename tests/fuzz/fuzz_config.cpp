// The TOML loader: parsing, every check, the sweep, and the text it is written back as; and the same text as the file
// of a machine.

#include "fuzz/target.hpp"
#include "nsa/config/config.hpp"
#include "nsa/config/machine.hpp"

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  nsa::fuzz::attempt([&] { nsa::parse_machine(text, "fuzz.toml"); });
  return nsa::fuzz::attempt([&] {
    const nsa::Config config = nsa::parse_config(text, "fuzz.toml", {"run.seed=7"});
    nsa::validate(config);
    // A config that passed is written as TOML that reads back to the same TOML.
    const std::string text = nsa::to_toml(config);
    if (nsa::to_toml(nsa::parse_config(text, "written.toml", {})) != text) std::abort();
  });
}
