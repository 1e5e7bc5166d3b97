// The CSV reader and the audit of what it read, as `nsa gate FILE.csv` uses them.

#include <sstream>

#include "fuzz/target.hpp"
#include "nsa/gate/csv_audit.hpp"

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  return nsa::fuzz::attempt([&] {
    const nsa::Csv csv = nsa::parse_csv({reinterpret_cast<const char*>(data), size}, "fuzz.csv");
    std::ostringstream page;
    nsa::print_audit(page, nsa::audit_csv(csv));
  });
}
