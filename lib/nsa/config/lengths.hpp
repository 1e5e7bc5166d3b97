#pragma once
// Lengths of the sequences of a ragged batch: given, drawn from a distribution, or those of a trace of requests.

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "nsa/config/config.hpp"

namespace nsa {

/// The requests of a trace, in its order: CSV with a header that names the columns (`prompt` or a name that public
/// traces give it, and `output` where there is one), lengths one a line, a JSON list of objects or of lengths, or one
/// JSON object a line. Other columns are ignored. Throws one UserError(file) "path:line: ..." for the first line that
/// holds no such request.
std::vector<Request> parse_trace(std::string_view text, const std::string& path);

/// Tokens of each sequence before the first step, of a batch of `batch` sequences with `mean` tokens in the mean; empty
/// where all have `mean`. Needs a valid config. Throws UserError where a trace has fewer than `batch` requests.
std::vector<std::int64_t> sequence_lengths(const BatchConfig& config, Distribution distribution, std::int64_t mean,
                                           std::int64_t batch);

}  // namespace nsa
