#include "nsa/config/lengths.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <charconv>
#include <cmath>
#include <numeric>

#include "kernels/diagnostics/error.hpp"
#include "kernels/diagnostics/json.hpp"
#include "kernels/shared/random.hpp"
#include "nsa/config/csv_rows.hpp"
#include "nsa/config/keys.hpp"

namespace nsa {
namespace {

// Names of the two columns, in lower case with underscores: the first ones are ours, the others those of public traces.
constexpr std::array prompt_names = {"prompt",         "prompt_tokens", "contexttokens", "context_tokens",
                                     "request_tokens", "input_length",  "input_tokens",  "length"};
constexpr std::array output_names = {"output",           "output_tokens",   "generatedtokens",
                                     "generated_tokens", "response_tokens", "output_length"};

template <std::size_t n>
bool is_one_of(const std::array<const char*, n>& names, const std::string& name) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

std::string normalised(std::string_view name) {
  std::string text;
  for (const char c : name) text += c == ' ' ? '_' : static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return text;
}

/// Where a trace is read, for messages.
struct TracePosition {
  const std::string& path;
  std::int64_t line = 1;

  [[noreturn]] void refuse(const std::string& what, const std::string& advice) const {
    throw UserError(fmt::format("{}:{}: {}; {}", path, line, what, advice), ExitCode::file);
  }
  std::int64_t tokens(std::string_view text, std::int64_t least) const {
    std::int64_t value = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error != std::errc() || end != text.data() + text.size() || value < least || value > token_range.most)
      refuse(json_text(std::string(text)) + " is no number of tokens",
             fmt::format("give {} to {}", least, token_range.most));
    return value;
  }
  /// The request, if its sequence stays in range.
  Request checked(const Request& request) const {
    if (request.prompt + request.output > token_range.most)
      refuse(fmt::format("{} + {} tokens are too many", request.prompt, request.output),
             fmt::format("give at most {} together", token_range.most));
    return request;
  }
};

/// The columns of a CSV that hold the tokens; -1: none.
struct Columns {
  std::ptrdiff_t prompt = -1, output = -1;
};

Columns columns_of(const std::vector<std::string>& header) {
  Columns columns;
  for (std::size_t i = 0; i < header.size(); ++i) {
    const std::string name = normalised(header[i]);
    if (columns.prompt < 0 && is_one_of(prompt_names, name)) columns.prompt = static_cast<std::ptrdiff_t>(i);
    if (columns.output < 0 && is_one_of(output_names, name)) columns.output = static_cast<std::ptrdiff_t>(i);
  }
  return columns;
}

bool starts_with_digit(std::string_view text) {
  return !text.empty() && std::isdigit(static_cast<unsigned char>(text.front()));
}

std::vector<Request> parse_csv(std::string_view text, const std::string& path) {
  TracePosition at{path};
  std::vector<Request> requests;
  Columns columns;
  std::size_t width = 0;  // cells of the header
  CsvReader reader(text, [&](std::int64_t line, CsvFault fault) {
    at.line = line;
    if (fault == CsvFault::open_quote) at.refuse("a quote without its end", "close it");
    at.refuse("text after a closing quote", "put all of the cell into quotes");
  });
  while (!reader.done()) {
    const CsvRow row = reader.row();
    const std::vector<std::string>& cells = row.cells;
    at.line = row.line;
    if (row.blank()) continue;
    if (columns.prompt < 0) {
      columns = columns_of(cells);
      width = cells.size();
      if (columns.prompt >= 0) continue;
      if (cells.size() > 1 || !starts_with_digit(cells[0]))
        at.refuse("no column prompt", "give a header \"prompt,output\" with commas, or one length a line");
      columns.prompt = 0;
    }
    if (cells.size() != width)  // a comma too many, as in 1,024, would move the numbers to other columns
      at.refuse(fmt::format("{} cells in a table of {} columns", cells.size(), width),
                "give one for each column, in quotes where it holds a comma");
    Request request{at.tokens(cells[static_cast<std::size_t>(columns.prompt)], 1)};
    if (columns.output >= 0) request.output = at.tokens(cells[static_cast<std::size_t>(columns.output)], 0);
    requests.push_back(at.checked(request));
  }
  return requests;
}

/// Reads JSON of lists, objects, strings and numbers; takes the requests of the objects and the numbers of lists that
/// are in no object.
class JsonTrace {
 public:
  JsonTrace(std::string_view text, const std::string& path) : rest_(text), at_{path} {}

  std::vector<Request> parse() {
    for (skip_blanks(); !rest_.empty(); skip_blanks()) value(nullptr);  // one value, or one a line
    return std::move(requests_);
  }

 private:
  static constexpr int max_depth = 64;

  void skip_blanks() {
    while (!rest_.empty() && std::isspace(static_cast<unsigned char>(rest_.front()))) take();
  }
  char take() {
    if (rest_.empty()) at_.refuse("the JSON ends early", "give the whole file");
    const char c = rest_.front();
    if (c == '\n') ++at_.line;
    rest_.remove_prefix(1);
    return c;
  }
  bool takes(char c) {
    skip_blanks();
    if (rest_.empty() || rest_.front() != c) return false;
    take();
    return true;
  }
  void expect(char c) {
    if (!takes(c)) at_.refuse(fmt::format("no '{}' where JSON has one", c), "correct the file");
  }
  std::string string() {
    std::string text;
    for (char c = take(); c != '"'; c = take()) text += c == '\\' ? take() : c;
    return text;
  }
  /// A value; `text`: where to put a number, null in a list of lengths.
  void value(std::string* text) {
    skip_blanks();
    if (++depth_ > max_depth) at_.refuse("lists in lists without end", "give a list of objects or of lengths");
    if (takes('[')) {
      list(text);
    } else if (takes('{')) {
      object(text != nullptr);
    } else if (takes('"')) {
      const std::string read = string();
      if (text) *text = read;
    } else {
      std::string number;
      while (!rest_.empty() && std::string_view(",]} \t\r\n").find(rest_.front()) == std::string_view::npos)
        number += take();
      if (number.empty()) at_.refuse("no value where JSON has one", "correct the file");
      if (text)
        *text = number;
      else
        requests_.push_back({at_.tokens(number, 1)});
    }
    --depth_;
  }
  void list(const std::string* in_object) {
    std::string ignored;
    if (takes(']')) return;
    do value(in_object ? &ignored : nullptr);
    while (takes(','));
    expect(']');
  }
  void object(bool nested) {
    Request request;
    bool found = false;
    if (!takes('}')) {
      do {
        expect('"');
        const std::string name = normalised(string());
        expect(':');
        std::string text;
        value(&text);
        if (nested) continue;
        if (is_one_of(prompt_names, name)) request.prompt = at_.tokens(text, 1), found = true;
        if (is_one_of(output_names, name)) request.output = at_.tokens(text, 0);
      } while (takes(','));
      expect('}');
    }
    if (nested) return;
    if (!found) at_.refuse("an object without prompt", "give objects {\"prompt\": 4096, \"output\": 128}");
    requests_.push_back(at_.checked(request));
  }

  std::string_view rest_;
  TracePosition at_;
  std::vector<Request> requests_;
  int depth_ = 0;
};

/// Uniform in (0, 1): the i-th draw of a seed.
double uniform(std::int64_t seed, const char* what, std::int64_t i) {
  const Philox4 r = philox(tensor_key(static_cast<std::uint64_t>(seed), what),
                           {{static_cast<std::uint32_t>(i), static_cast<std::uint32_t>(i >> 32), 0, 0}});
  return (static_cast<double>(r.v[0]) + 0.5) / 4294967296.0;
}

/// Relative lengths by the distribution, in no order.
std::vector<double> draw_weights(const BatchConfig& b, Distribution distribution, std::int64_t batch) {
  constexpr double two_pi = 6.283185307179586;
  std::vector<double> weights;
  for (std::int64_t i = 0; i < batch; ++i) {
    const double u = uniform(b.seed, "lengths", i), v = uniform(b.seed, "angles", i);
    if (distribution == Distribution::uniform) weights.push_back(u);
    if (distribution == Distribution::lognormal)  // Box and Muller
      weights.push_back(std::exp(b.sigma * std::sqrt(-2.0 * std::log(u)) * std::cos(two_pi * v)));
    if (distribution == Distribution::zipf) weights.push_back(std::pow(static_cast<double>(i + 1), -b.exponent));
  }
  if (distribution == Distribution::zipf)
    for (std::int64_t i = batch - 1; i > 0; --i)
      std::swap(weights[i],
                weights[static_cast<std::int64_t>(uniform(b.seed, "order", i) * static_cast<double>(i + 1))]);
  return weights;
}

/// Lengths in proportion to the weights, but within [least, most], of `total` tokens together.
std::vector<std::int64_t> scaled(const std::vector<double>& weights, std::int64_t total, std::int64_t least,
                                 std::int64_t most) {
  const auto lengths_at = [&](double scale) {
    std::vector<std::int64_t> lengths;
    for (const double w : weights)
      lengths.push_back(
          static_cast<std::int64_t>(std::clamp(scale * w, static_cast<double>(least), static_cast<double>(most))));
    return lengths;
  };
  const auto sum_of = [](const std::vector<std::int64_t>& lengths) {
    return std::accumulate(lengths.begin(), lengths.end(), std::int64_t{0});
  };
  double low = 0, high = 1;
  while (sum_of(lengths_at(high)) < total && high < 1e300) high *= 2;
  for (int i = 0; i < 200; ++i) {
    const double middle = low + (high - low) / 2;
    (sum_of(lengths_at(middle)) <= total ? low : high) = middle;
  }
  std::vector<std::int64_t> lengths = lengths_at(low);
  for (std::int64_t missing = total - sum_of(lengths), before = -1; missing > 0 && missing != before;) {
    before = missing;
    for (std::int64_t& length : lengths)
      if (missing > 0 && length < most) ++length, --missing;
  }
  return lengths;
}

}  // namespace

std::vector<Request> parse_trace(std::string_view text, const std::string& path) {
  constexpr std::string_view byte_order_mark = "\xef\xbb\xbf";  // spreadsheets write it
  if (text.starts_with(byte_order_mark)) text.remove_prefix(byte_order_mark.size());
  const auto first = text.find_first_not_of(" \t\r\n");
  const bool json = first != std::string_view::npos && (text[first] == '[' || text[first] == '{');
  std::vector<Request> requests = json ? JsonTrace(text, path).parse() : parse_csv(text, path);
  if (requests.empty()) TracePosition{path}.refuse("no request", "give at least one");
  return requests;
}

std::vector<std::int64_t> sequence_lengths(const BatchConfig& b, Distribution distribution, std::int64_t mean,
                                           std::int64_t batch) {
  if (!b.context.empty()) return b.context;
  if (distribution == Distribution::equal) return {};
  if (distribution != Distribution::file)
    return scaled(draw_weights(b, distribution, batch), mean * batch, b.least, b.most);
  if (std::ssize(b.requests) < batch)
    throw UserError(
        fmt::format("batch.file = \"{}\" holds {} requests, fewer than run.batch = {}; lower run.batch, or "
                    "give a longer trace",
                    b.file, b.requests.size(), batch));
  std::vector<std::int64_t> lengths;
  for (std::int64_t i = 0; i < batch; ++i) {
    const Request& r = b.requests[static_cast<std::size_t>(i)];
    lengths.push_back(r.prompt +
                      static_cast<std::int64_t>(uniform(b.seed, "output", i) * static_cast<double>(r.output)));
  }
  return lengths;
}

}  // namespace nsa
