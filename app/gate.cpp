#include "app/gate.hpp"

#include <algorithm>
#include <array>
#include <fstream>
#include <iostream>
#include <sstream>

#include "nsa/gate/caches.hpp"
#include "nsa/gate/csv_audit.hpp"
#include "nsa/gate/gate.hpp"
#include "nsa/results/files.hpp"
#include "nsa/results/temporary_file.hpp"

namespace nsa {
namespace {

constexpr int stay = 10, inconclusive = 11, not_evidence = 12;

int exit_code_of(Verdict verdict) {
  return verdict == Verdict::proceed ? 0 : verdict == Verdict::stay ? stay : inconclusive;
}

/// Whether the name ends in .csv and the content is not HDF5.
bool is_csv(const std::string& path) {
  if (!path.ends_with(".csv") || status_of(path).kind != PathStatus::file) return false;
  std::array<char, 4> begin{};
  std::ifstream(path, std::ios::binary).read(begin.data(), begin.size());
  return std::string_view(begin.data(), 4) != "\x89HDF";
}

void write_adr(const std::string& path, const std::vector<DeviceVerdict>& devices) {
  if (devices.size() != 1)
    throw UserError("--adr records the verdict of one device (the files are of " + std::to_string(devices.size()) +
                    "); give the files of one");
  std::ostringstream text;
  print_adr(text, devices[0]);
  write_text_file(path, "--adr", text.str());
}

/// The verdict on FP8 caches in place of that on a selection kernel.
ExitCode gate_caches(const GateOptions& options, const std::vector<GateFile>& files) {
  if (options.json)
    throw UserError("--json is for the M4 gate (a file has FP8 caches, which have a page of their own); leave it out");
  const std::vector<CachesVerdict> verdicts = judge_caches(files);
  std::ostringstream text;
  const char* between = "";
  int code = 0;
  for (const CachesVerdict& verdict : verdicts) {
    print_caches(text << std::exchange(between, "\n\n"), verdict);
    code = std::max(code, exit_code_of(verdict.verdict));
  }
  std::cout << text.str();
  if (!options.adr.empty()) write_text_file(options.adr, "--adr", "```\n" + text.str() + "```\n");
  return static_cast<ExitCode>(options.exit_verdict ? code : 0);
}

}  // namespace

ExitCode gate(const GateOptions& options) {
  std::vector<NamedFile> files{};
  for (const std::string& path : options.files) files.push_back({NamedFile::read, path, "an input", ""});
  files.push_back({NamedFile::text, options.adr, "the decision record", "--adr"});
  check_written_files(files);
  std::vector<GateFile> results;
  std::vector<CsvAudit> audits;
  for (const std::string& path : options.files) {
    if (is_csv(path))
      audits.push_back(audit_csv(read_csv(path)));
    else
      results.push_back({path, read_result(path)});
  }
  if (std::ranges::any_of(results, has_fp8_caches)) return gate_caches(options, results);
  const std::vector<DeviceVerdict> devices = judge(results, options.contexts);
  if (options.json) {
    print_gate_json(std::cout, devices, audits);
  } else {
    const char* between = "";
    for (const CsvAudit& audit : audits) print_audit(std::cout << std::exchange(between, "\n\n"), audit);
    for (const DeviceVerdict& device : devices) print_gate(std::cout << std::exchange(between, "\n\n"), device);
  }
  if (!options.adr.empty()) write_adr(options.adr, devices);
  int code = 0;
  for (const DeviceVerdict& device : devices) code = std::max(code, exit_code_of(device.verdict));
  for (const CsvAudit& audit : audits) code = std::max(code, audit.evidence() ? 0 : not_evidence);
  return static_cast<ExitCode>(options.exit_verdict ? code : 0);
}

}  // namespace nsa
