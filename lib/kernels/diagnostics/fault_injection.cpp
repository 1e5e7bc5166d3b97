#include "kernels/diagnostics/fault_injection.hpp"

#include <signal.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <map>
#include <mutex>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "kernels/diagnostics/error.hpp"

namespace nsa::fault {

namespace {

enum class Kind { kill, stop, hang, delay, site };

struct Rule {
  std::string site;
  std::int64_t rank = -1, call = 1;  // call 0: all calls
  Kind kind = Kind::site;
  Fault fault;
  double seconds = 0;
};

std::atomic<int> own_rank = 0;

[[noreturn]] void refuse(const std::string& rule, const std::string& why) {
  throw UserError("NSA_FAULT: \"" + rule + "\" (" + why + "); see lib/kernels/diagnostics/fault_injection.hpp");
}

double parse_number(const std::string& rule, const std::string& text) {
  char* end = nullptr;
  const double value = std::strtod(text.c_str(), &end);
  if (text.empty() || *end != '\0') refuse(rule, "\"" + text + "\" is no number");
  return value;
}

/// Sets the action if the word names one.
bool set_action(Rule& rule, const std::string& word, double value) {
  static const std::map<std::string, Kind> hook_actions = {
      {"kill", Kind::kill}, {"stop", Kind::stop}, {"hang", Kind::hang}, {"delay", Kind::delay}};
  static const std::map<std::string, Action> site_actions = {
      {"fail", Action::fail}, {"skip", Action::skip}, {"shorten", Action::shorten}, {"flip", Action::flip}};
  if (const auto found = hook_actions.find(word); found != hook_actions.end()) {
    rule.kind = found->second;
    rule.seconds = value;
    return true;
  }
  const auto found = site_actions.find(word);
  if (found == site_actions.end()) return false;
  rule.fault = {found->second, static_cast<std::int64_t>(value)};
  return true;
}

Rule parse_rule(const std::string& text) {
  Rule rule;
  bool has_action = false;
  std::istringstream fields(text);
  std::getline(fields, rule.site, ':');
  for (std::string field; std::getline(fields, field, ':');) {
    const auto equals = field.find('=');
    const std::string word = field.substr(0, equals),
                      value = equals == std::string::npos ? "" : field.substr(equals + 1);
    if (word == "rank") {
      rule.rank = static_cast<std::int64_t>(parse_number(text, value));
    } else if (word == "at") {
      rule.call = value == "every" ? 0 : static_cast<std::int64_t>(parse_number(text, value));
    } else if (set_action(rule, word, equals == std::string::npos ? 0 : parse_number(text, value))) {
      has_action = true;
    } else {
      refuse(text, "unknown word \"" + word + "\"");
    }
  }
  if (rule.site.find('.') == std::string::npos) refuse(text, "it starts with no site");
  if (!has_action) refuse(text, "it has no action");
  return rule;
}

const std::vector<Rule>& rules() {
  static const std::vector<Rule> parsed = [] {
    std::vector<Rule> list;
    const char* variable = std::getenv("NSA_FAULT");
    std::istringstream text(variable ? variable : "");
    for (std::string rule; std::getline(text, rule, ';');)
      if (!rule.empty()) list.push_back(parse_rule(rule));
    return list;
  }();
  return parsed;
}

std::int64_t count_call(const std::string& site) {
  static std::mutex guard;
  static std::map<std::string, std::int64_t> calls;
  const std::lock_guard lock(guard);
  return ++calls[site];
}

void sleep_for(double seconds) { std::this_thread::sleep_for(std::chrono::duration<double>(seconds)); }

}  // namespace

void set_rank(int rank) { own_rank = rank; }

Fault at(const char* site) {
  if (rules().empty()) return {};
  const std::int64_t call = count_call(site);
  for (const Rule& rule : rules()) {
    if (rule.site != site || (rule.rank >= 0 && rule.rank != own_rank) || (rule.call > 0 && rule.call != call))
      continue;
    if (rule.kind == Kind::site) return rule.fault;
    if (rule.kind == Kind::kill) raise(SIGKILL);
    if (rule.kind == Kind::stop) raise(SIGSTOP);
    while (rule.kind == Kind::hang) sleep_for(60);
    sleep_for(rule.seconds);
  }
  return {};
}

void flip(const char* site, const DeviceOps& device, void* data, std::size_t bytes, Stream* stream) {
  const Fault fault = at(site);
  if (!fault.is(Action::flip) || bytes == 0) return;
  const std::size_t bit = static_cast<std::size_t>(fault.value) % (8 * bytes);
  auto* address = static_cast<unsigned char*>(data) + bit / 8;
  unsigned char byte = 0;
  device.synchronize(stream);
  device.copy(&byte, address, 1, stream);
  device.synchronize(stream);
  byte ^= static_cast<unsigned char>(1u << bit % 8);
  device.copy(address, &byte, 1, stream);
  device.synchronize(stream);
}

void refuse_launch(const char* site, const DeviceOps& device, Stream* stream) {
  if (!at(site).is(Action::fail)) return;
  if (device.refused_launch) device.refused_launch(stream);
  throw LaunchError("launch refused (by NSA_FAULT)");
}

}  // namespace nsa::fault
