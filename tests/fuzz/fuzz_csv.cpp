// The CSV reader and the audit of what it read, as `nsa gate FILE.csv` uses them; and the same text as a trace of
// requests (batch.file), CSV or JSON.

#include <sstream>

#include "fuzz/target.hpp"
#include "nsa/config/lengths.hpp"
#include "nsa/gate/csv_audit.hpp"

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  nsa::fuzz::attempt([&] {
    nsa::BatchConfig batch;
    batch.requests = nsa::parse_trace(text, "fuzz.csv");
    const auto count = std::ssize(batch.requests);
    for (const std::int64_t length : nsa::sequence_lengths(batch, nsa::Distribution::file, 1, count))
      if (length < 1 || length > (1 << 30)) std::abort();
  });
  return nsa::fuzz::attempt([&] {
    const nsa::Csv csv = nsa::parse_csv(text, "fuzz.csv");
    std::ostringstream page;
    nsa::print_audit(page, nsa::audit_csv(csv));
  });
}
