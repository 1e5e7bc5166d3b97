#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <set>
#include <string>

#include "catch.hpp"
#include "kernels/diagnostics/error.hpp"
#include "kernels/shared/acceptance.hpp"
#include "nsa/config/config.hpp"
#include "nsa/config/lengths.hpp"
#include "nsa/model/partition.hpp"

using namespace nsa;

namespace {

std::string message_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const UserError& error) {
    CHECK(error.code() == ExitCode::usage);
    return error.what();
  }
  return "";
}

Config parse(const std::string& text, const std::vector<std::string>& overrides = {}) {
  return parse_config(text, "in.toml", overrides);
}

std::string parse_error(const std::string& text, const std::vector<std::string>& overrides = {}) {
  return message_of([&] { parse(text, overrides); });
}

std::string violations(const std::string& text, const std::vector<std::string>& overrides = {}) {
  const Config config = parse(text, overrides);
  return message_of([&] { validate(config); });
}

bool has(const std::string& text, const std::string& part) {
  INFO("looking for: " << part << "\nin: " << text);
  const bool found = text.find(part) != std::string::npos;
  CHECK(found);
  return found;
}

std::size_t lines(const std::string& text) { return 1 + std::count(text.begin(), text.end(), '\n'); }

const std::string decode = "[task]\nkind = \"decode\"\n";

}  // namespace

TEST_CASE("everything has a default but the kind", "[config]") {
  const Config c = parse(decode);
  CHECK(c.model.dim == 256);
  CHECK(c.nsa.l_sel == 64);
  CHECK(c.run.context == std::vector<std::int64_t>{128, 256, 512, 1024});
  CHECK(violations(decode).empty());
  has(parse_error("[model]\ndim = 64\n"),
      "in.toml:1:1: task.kind is missing; give kind in [task], one of \"decode\", \"prefill\", \"mixed\", \"kernels\", "
      "\"needle\"");
}

TEST_CASE("a full input, scalars for lists, integers for reals", "[config]") {
  const Config c = parse(
      "[task]\nkind = \"needle\"\n[model]\nprecision = \"fp32\"\nrope_base = 500000\nshared_kv = true\n"
      "[nsa]\nphi = \"mlp\"\nphi_hidden = 128\nw = 17\n"
      "[run]\nbackend = \"host\"\ncontext = 64\nmodes = \"total\"\nforce_branch = [\"none\", \"win\"]\nscope = "
      "\"attention\"\n[parallel]\nheads = 2\nkv = \"auto\"\n[route]\nsel = \"sdpa\"\n"
      "[runtime]\nsel_triton_min_L = 5\n[needle]\ndepths = [0, 0.5]\n[input]\nfile = \"x.h5\"\n"
      "[output]\ntensors = true\n");
  CHECK(c.kind == TaskKind::needle);
  CHECK(c.model.precision == DType::f32);
  CHECK(c.model.rope_base == 500000.0);
  CHECK(c.model.shared_kv);
  CHECK(c.phi == PhiKind::mlp);
  CHECK(c.phi_hidden == 128);
  CHECK(c.nsa.w == 17);
  CHECK(c.run.backend == BackendChoice::host);
  CHECK(c.run.context == std::vector<std::int64_t>{64});
  CHECK(c.run.modes == std::vector<Mode>{Mode::total});
  CHECK(c.run.force_branch == std::vector<std::int32_t>{-1, win});
  CHECK(c.run.scope == Scope::attention);
  CHECK(c.parallel.heads == 2);
  CHECK(c.parallel.kv == 0);
  CHECK(c.route.implementation[sel] == "sdpa");
  CHECK(c.runtime.sel_triton_min_l == 5);
  CHECK(c.needle.depths == std::vector<double>{0.0, 0.5});
  CHECK(c.input_file == "x.h5");
  CHECK(c.output.tensors);
}

TEST_CASE("a syntax error names its position", "[config]") {
  has(parse_error("[task]\nkind = = 1\n"), "in.toml:2:8: not TOML");
  has(parse_error("[task]\nkind = \"decode\"\nkind = \"decode\"\n"), "in.toml:3:");
}

TEST_CASE("characters beyond ASCII are allowed in strings and comments only", "[config]") {
  const std::string e = "\xC3\xA9";  // as U+0497 below, one that toml++ 3.3 calls unreachable
  const auto file = [&](const std::string& value) {
    return parse_config("\xEF\xBB\xBF" + decode + "[output]\nfile = " + value + " # " + e + "\n", "in.toml", {})
        .output.file;
  };
  CHECK(file("'" + e + ".h5'") == e + ".h5");
  CHECK(file("\"\"\"" + e + "'\n\\\"b\"\"\"") == e + "'\n\"b");
  CHECK(file("\"\"\"a\\\n  " + e + "\"\"\"") == "a" + e);
  CHECK(parse_config(decode, "in.toml", {"output.file=" + e + ".h5"}).output.file == e + ".h5");
  has(parse_error(decode + "[output]\nfile = '\\' # '\n  " + e + " = 1\n"), "in.toml:5:3: not TOML");
  has(parse_error(decode + "[output]\nfile =-\"\xD2\x97\"\n"), "in.toml:4:");
  has(parse_error(decode + "[output]\nfile =-[\"rtx\xD2\x97 "), "in.toml:4:");
  has(parse_error("\xD2\x97"), "in.toml:1:1: not TOML");
}

TEST_CASE("an unknown key names the nearest known one", "[config]") {
  CHECK(parse_error(decode + "[run]\ncontxt = 64\n") ==
        "in.toml:4:1: unknown key run.contxt; did you mean context in [run]?");
  has(parse_error(decode + "[model]\nn_sel = 8\n"), "did you mean n_sel in [nsa]?");
  has(parse_error(decode + "[modle]\ndim = 8\n"), "in.toml:3:2: unknown section [modle]; did you mean [model]?");
  has(parse_error("dim = 8\n" + decode), "in.toml:1:1: dim is outside a section; did you mean model.dim?");
  has(parse_error("model = 8\n" + decode), "in.toml:1:1: model is a section (found a value); write [model]");
}

TEST_CASE("an error of type names the value and the expected type", "[config]") {
  has(parse_error(decode + "[run]\nsteps = \"many\"\n"),
      "in.toml:4:9: run.steps holds the string \"many\"; give an integer");
  has(parse_error(decode + "[run]\nsteps = 1.5\n"), "the number 1.5; give an integer");
  has(parse_error(decode + "[run]\ncheck = 1\n"), "the integer 1; give true or false");
  has(parse_error(decode + "[model]\nprecision = \"fp8\"\n"), "give one of \"fp32\", \"bf16\", \"fp16\"");
  has(parse_error(decode + "[run]\ncontext = [64, [1]]\n"), "in.toml:4:16: run.context holds a list");
  has(parse_error(decode + "[nsa]\nl = 4294967328\n"), "an integer of 32 bits");  // 32 if it wrapped
  has(parse_error(decode + "[parallel]\nkv = 0\n"), "\"auto\" or a positive integer");
}

TEST_CASE("several errors are listed in one message, in the order of the file, then of the command line", "[config]") {
  const std::string text =
      parse_error("[task]\nkind = 3\n[run]\ncontxt = 1\n[nsa]\nl = true\n", {"run.stps=3", "bare"});
  CHECK(text.substr(0, text.find('\n')) == "5 problems in the input");
  CHECK(lines(text) == 6);
  const std::size_t at[] = {text.find("in.toml:2:8: task.kind"), text.find("in.toml:4:1: unknown key run.contxt"),
                            text.find("in.toml:6:5: nsa.l holds true"), text.find("--set bare: no value given"),
                            text.find("--set run.stps=3: unknown key run.stps")};
  for (const std::size_t place : at) CHECK(place != std::string::npos);
  CHECK(std::is_sorted(std::begin(at), std::begin(at) + 3));
}

TEST_CASE("--set overrides the file, with and without quotes", "[config]") {
  const Config c = parse(decode + "[run]\ncontext = 64\nsteps = 9\n",
                         {"run.context=[32, 33]", "run.backend=host", "output.file=/a/b.h5", "run.min_time=0.5",
                          "output.csv=", "model.gate=\"sigmoid\"", "run.check=false", "run.steps=1", "run.steps=2"});
  CHECK(c.run.context == std::vector<std::int64_t>{32, 33});
  CHECK(c.run.backend == BackendChoice::host);
  CHECK(c.output.file == "/a/b.h5");
  CHECK(c.run.min_time == 0.5);
  CHECK(c.output.csv.empty());
  CHECK(c.model.gate == GateKind::sigmoid);
  CHECK_FALSE(c.run.check);
  CHECK(c.run.steps == 2);
  has(parse_error(decode, {"run.steps=1\nx = 2"}), "run.steps holds the string");
}

TEST_CASE("every violated constraint is listed with its position", "[config]") {
  const std::string text = violations(
      "[task]\nkind = \"decode\"\n[model]\nn_heads = 3\nd_k = 63\n[nsa]\nl = 80\nd = 7\nn_sel = 2\n"
      "[run]\nwarmup = 40\ncontext = []\nbatch = [1, 1]\n[parallel]\nheads = 4\n[needle]\ndepths = [0.5, 1.5]\n",
      {"run.min_time=-1"});
  has(text, "in.toml:4:1: model.n_kv_groups = 2 must divide model.n_heads = 3");
  has(text, "in.toml:5:1: model.d_k = 63 must be even");
  has(text, "in.toml:7:1: nsa.l = 80 must be at most nsa.l_sel = 64");
  has(text, "in.toml:8:1: nsa.d = 7 must divide nsa.l = 80");
  has(text, "in.toml:8:1: nsa.d = 7 must divide nsa.l_sel = 64");
  has(text, "in.toml:9:1: nsa.n_sel = 2 must be at least nsa.n_init + nsa.n_local = 1 + 2");
  has(text, "in.toml:11:1: run.warmup = 40 must be less than run.steps = 32");
  has(text, "in.toml:12:1: run.context is empty");
  has(text, "in.toml:13:1: run.batch holds a value twice");
  has(text, "in.toml:15:1: parallel.heads = 4 must divide model.n_kv_groups = 2");
  has(text, "in.toml:17:1: needle.depths = 1.5 is out of range");
  has(text, "--set run.min_time=-1: run.min_time = -1");
  CHECK(lines(text) == 13);
}

TEST_CASE("what times launches and intervals has its rules", "[config]") {
  has(violations(decode, {"run.steps_per_graph=3"}),
      "run.steps_per_graph = 3 must divide run.steps = 32 and run.warmup = 8");
  has(violations(decode, {"run.steps_per_graph=16"}), "run.steps_per_graph = 16 must divide");
  CHECK(violations(decode, {"run.steps_per_graph=8", "run.modes=[\"total\", \"launches\"]"}).empty());
  has(violations(decode, {"run.steps_per_graph=0"}), "run.steps_per_graph = 0 is out of range");
  const std::string other = violations(decode, {"task.kind=prefill", "run.steps_per_graph=4", "run.modes=launches"});
  has(other, "run.steps_per_graph needs task.kind = \"decode\"");
  has(other, "run.modes: \"launches\" needs task.kind = \"decode\"");
  has(violations(decode, {"task.kind=needle", "run.min_interval=0.02"}), "run.min_interval needs task.kind");
  has(violations(decode, {"run.min_interval=2"}), "run.min_interval = 2 is out of range");
}

TEST_CASE("a prefix and prefill chunks belong to prefill, within the positions there are", "[config]") {
  const char* prefill = "task.kind=prefill";
  CHECK(violations(decode, {prefill, "run.prefix=57344", "run.context=[100, 8192]", "run.prefill_chunk=7"}).empty());
  CHECK(violations(decode, {prefill, "run.context=64", "run.prefill_chunk=4096"}).empty());  // one chunk
  has(violations(decode, {prefill, "run.prefix=-1"}), "run.prefix = -1 is out of range; give 0 to");
  has(violations(decode, {prefill, "run.prefix=1073741824", "run.context=[1, 2]"}),
      "run.prefix + run.context = 1073741824 + 2 is out of range; together at most 1073741824 positions");
  has(violations(decode, {prefill, "run.prefill_chunk=-4"}), "run.prefill_chunk = -4 is out of range; give 1 to");
  has(parse_error(decode, {"run.prefill_chunk=0"}),
      "run.prefill_chunk holds the integer 0; give \"auto\" or a positive");
  const std::string other = violations(decode, {"run.prefix=5", "run.prefill_chunk=4"});
  has(other, "run.prefix needs task.kind = \"prefill\" or \"mixed\"");
  has(other, "run.prefill_chunk needs task.kind = \"prefill\" or \"mixed\"; leave it out");
}

TEST_CASE("a mixed step has a chunk, and nothing that its two parts would have to share", "[config]") {
  const std::string mixed = "[task]\nkind = \"mixed\"\n";
  CHECK(violations(mixed, {"run.prefill_chunk=64"}) == "");
  CHECK(violations(mixed, {"run.prefill_chunk=64", "run.prefix=4096", "run.query_tokens=4", "run.accept=0.5",
                           "batch.context=[7, 4096]", "cache.layout=paged", "cache.shared_prefix=7"}) == "");
  has(violations(mixed), "task.kind = \"mixed\" needs run.prefill_chunk, the tokens that each step prefills; set it");
  has(violations(mixed, {"run.prefill_chunk=2", "run.prefix=1073741823"}),
      "run.prefix + run.prefill_chunk = 1073741823 + 2 is out of range; together at most 1073741824 positions");
  // The shared prefix is one of the decode rows.
  has(violations(mixed, {"run.prefill_chunk=64", "run.prefix=4096", "run.context=128", "cache.layout=paged",
                         "cache.shared_prefix=129"}),
      "cache.shared_prefix = 129 must be at most 128");
  const std::string other =
      violations(mixed, {"run.prefill_chunk=64", "run.modes=launches", "run.steps_per_graph=4", "input.file=x.h5",
                         "input.selection=s.h5", "output.selection=true", "output.csv=o.csv"});
  for (const char* key : {"input.file", "input.selection", "output.selection", "output.csv"})
    has(other, key + std::string(" needs task.kind = \"decode\" or \"prefill\" ("));
  has(other, "run.modes: \"launches\" needs task.kind = \"decode\"");
  has(other, "run.steps_per_graph needs task.kind = \"decode\"");
}

TEST_CASE("pages hold whole blocks, and every sequence the shared prefix", "[config]") {
  const std::string decode = "[task]\nkind = \"decode\"\n[cache]\nlayout = \"paged\"\n";
  CHECK(violations(decode) == "");
  CHECK(violations(decode, {"cache.page=192", "cache.shared_prefix=128"}) == "");
  CHECK(has(violations(decode + "page = 96\n"), "in.toml:5:1: cache.page = 96 must be a multiple of nsa.l_sel = 64"));
  CHECK(has(violations(decode + "shared_prefix = 129\n"),
            "in.toml:5:1: cache.shared_prefix = 129 must be at most 128, the tokens of the shortest sequence"));
  CHECK(has(violations(decode, {"batch.context=[700, 80]", "cache.shared_prefix=100"}), "must be at most 80"));
  CHECK(violations(decode, {"batch.context=[700, 80]", "cache.shared_prefix=80"}) == "");
  CHECK(has(violations(decode, {"cache.page=0"}), "cache.page = 0 is out of range"));
  CHECK(has(violations(decode, {"task.kind=\"needle\""}), "cache.layout = \"paged\" needs task.kind"));
  CHECK(has(violations(decode, {"cache.layout=contiguous", "cache.shared_prefix=16"}),
            "cache.page, cache.order and cache.shared_prefix need cache.layout = \"paged\""));
  const Config drawn =
      parse(decode, {"batch.distribution=uniform", "run.context=[64]", "run.batch=[8]", "cache.shared_prefix=60"});
  CHECK(has(message_of([&] { sweep(drawn); }), "cache.shared_prefix = 60 is longer than a sequence of"));
}

TEST_CASE("sizes have bounds", "[config]") {
  has(violations(decode, {"run.context=0"}), "run.context = 0 is out of range; give 1 to");
  has(violations(decode, {"nsa.d=0"}), "nsa.d = 0 is out of range");
  has(violations(decode, {"run.steps=0"}), "run.steps = 0 is out of range");
  has(violations(decode, {"run.context=9000000000000000000"}), "run.context = 9000000000000000000 is out of range");
  has(violations(decode, {"run.context=1000000000", "run.batch=60000", "model.dim=1000000"}), "is too large");
  has(violations(decode, {"needle.depths=nan"}), "needle.depths = nan");
  has(violations(decode, {"output.file="}), "output.file is empty");
  CHECK(violations(decode, {"run.context=1", "nsa.n_init=0", "nsa.w=1", "nsa.l=16", "nsa.l_sel=16"}).empty());
}

TEST_CASE("the TOML of a config parses back to itself", "[config]") {
  for (const std::vector<std::string>& overrides : std::vector<std::vector<std::string>>{
           {},
           {"output.csv=\"a\\\"b\\\\c\\n\"", "run.min_time=0.1", "model.rope_base=1e12", "parallel.kv=3",
            "run.force_branch=[\"none\",\"cmp\"]", "run.modes=[\"one_hot\"]", "needle.depths=[0.3333333333333333]",
            "run.seed=9223372036854775807"}}) {
    const Config config = parse(decode, overrides);
    const std::string text = to_toml(config);
    CHECK(to_toml(parse(text)) == text);
    for (const std::string& override : overrides) {  // the text holds the values that were set
      const auto dot = override.find('.'), equals = override.find('=');
      std::string line = "\n";
      line += override.substr(dot + 1, equals - dot - 1);
      has(text, line += " = ");
    }
    CHECK(parse(text).run.min_time == config.run.min_time);
    CHECK(parse(text).output.csv == config.output.csv);
    CHECK(parse(text).needle.depths == config.needle.depths);
    CHECK(parse(text).run.seed == config.run.seed);
  }
}

TEST_CASE("a sweep has one point for each context, batch and forced branch", "[config]") {
  const std::vector<Point> points =
      sweep(parse(decode, {"run.context=[8,16]", "run.batch=[1,2]", "run.force_branch=[\"none\",\"sel\"]"}));
  REQUIRE(points.size() == 8);
  CHECK(points[1].context == 16);
  CHECK(points[2].batch == 2);
  CHECK(points[4].force_branch == sel);
}

TEST_CASE("a batch has lengths of its own", "[config][batch]") {
  const auto point_of = [](std::vector<std::string> overrides) { return sweep(parse(decode, overrides)).at(0); };
  CHECK(!point_of({}).ragged());
  const Point listed = point_of({"batch.context=[4096, 70000, 4096]"});
  CHECK(listed.batch == 3);
  CHECK(listed.lengths == std::vector<std::int64_t>{4096, 70000, 4096});
  CHECK(listed.context == 26064);
  CHECK(listed.longest() == 70000);
  CHECK(sweep(parse(decode, {"batch.context=[4096, 70000]"})).size() == 1);
  CHECK(violations(decode, {"batch.context=[4096, 70000, 4096]"}).empty());
  const std::string text = to_toml(parse(decode, {"batch.context=[1, 2]", "batch.sigma=0.5"}));
  CHECK(to_toml(parse(text)) == text);
}

TEST_CASE("drawn lengths have the mean that is asked for and lie within the bounds", "[config][batch]") {
  for (const char* distribution : {"uniform", "lognormal", "zipf"})
    for (const std::int64_t batch : {1, 3, 32, 257}) {
      INFO(distribution << " " << batch);
      const std::vector<std::string> overrides = {"run.context=1000", "run.batch=" + std::to_string(batch),
                                                  std::string("batch.distribution=") + distribution, "batch.min=100",
                                                  "batch.max=5000"};
      CHECK(violations(decode, overrides).empty());
      const Point point = sweep(parse(decode, overrides)).at(0);
      CHECK(std::ssize(point.lengths) == batch);
      CHECK(point.context == 1000);
      CHECK(std::accumulate(point.lengths.begin(), point.lengths.end(), std::int64_t{0}) == 1000 * batch);
      for (const std::int64_t length : point.lengths) CHECK((length >= 100 && length <= 5000));
      if (batch > 3) CHECK(point.longest() > 1500);
      CHECK(sweep(parse(decode, overrides)).at(0).lengths == point.lengths);
      std::vector<std::string> other = overrides;
      other.push_back("batch.seed=2");
      if (batch > 3) CHECK(sweep(parse(decode, other)).at(0).lengths != point.lengths);
    }
  CHECK(sweep(parse(decode, {"run.context=[100, 200]", "run.batch=[2, 4]", "batch.distribution=zipf"})).size() == 4);
  const Config both = parse(decode, {"run.context=100", "run.batch=4", "batch.distribution=[\"equal\", \"zipf\"]"});
  REQUIRE(sweep(both).size() == 2);
  CHECK(!sweep(both)[0].ragged());
  CHECK(sweep(both)[1].ragged());
  CHECK(std::ranges::count(parameters(both, sweep(both)[1]), Parameter("batch.distribution", "zipf")) == 1);
}

TEST_CASE("the lengths of a batch come from one place", "[config][batch]") {
  has(violations(decode, {"batch.context=[8]", "run.context=64"}), "leave run.context and run.batch out");
  has(violations(decode, {"batch.context=[8]", "batch.distribution=zipf"}), "leave batch.distribution out");
  has(violations(decode, {"batch.context=[8, 0]"}), "batch.context = 0 is out of range");
  has(violations(decode, {"batch.context=[8, -4]"}), "batch.context = -4 is out of range");
  has(parse_error(decode, {"batch.context=[8, nan]"}), "batch.context holds the number nan; give an integer");
  has(violations(decode, {"batch.distribution=file"}), "needs batch.file");
  has(violations(decode, {"batch.distribution=[\"file\", \"zipf\"]"}), "give it alone, not in a list");
  has(violations(decode, {"batch.file=\"a.csv\""}), "is read with batch.distribution = \"file\" only");
  has(violations(decode, {"batch.distribution=file", "batch.file=\"a.csv\"", "run.context=64"}),
      "leave run.context out");
  has(violations(decode, {"batch.distribution=zipf", "batch.min=2000", "run.context=64"}),
      "must lie around run.context");
  has(violations(decode, {"task.kind=prefill", "batch.context=[8]"}), "needs task.kind = \"decode\"");
  has(violations(decode, {"batch.sigma=nan"}), "batch.sigma = nan is out of range");
}

TEST_CASE("a decode step has some query tokens, of which it accepts some", "[config][tokens]") {
  const std::vector<Point> points = sweep(parse(decode, {"run.query_tokens=[1, 4]", "run.context=64"}));
  REQUIRE(points.size() == 2);
  CHECK((points[0].query_tokens == 1 && points[1].query_tokens == 4));
  CHECK(parse(decode, {"run.accept=all"}).run.accept == 1.0);
  CHECK(parse(decode, {"run.accept=0.5"}).run.accept == 0.5);
  CHECK(to_toml(parse(decode, {})).find("\naccept = \"all\"\n") != std::string::npos);
  CHECK(to_toml(parse(decode, {"run.accept=0.5"})).find("\naccept = 0.5\n") != std::string::npos);
  CHECK(violations(decode, {"run.query_tokens=8", "run.accept=0"}).empty());
  has(violations(decode, {"run.query_tokens=0"}), "run.query_tokens = 0 is out of range; give 1 to 8");
  has(violations(decode, {"run.query_tokens=9"}), "run.query_tokens = 9 is out of range");
  has(violations(decode, {"run.query_tokens=2", "run.accept=1.5"}), "run.accept = 1.5 is out of range");
  has(violations(decode, {"run.query_tokens=2", "run.accept=nan"}), "run.accept = nan is out of range");
  has(violations(decode, {"run.accept=0.5"}), "run.accept needs run.query_tokens above 1");
  has(violations(decode, {"task.kind=prefill", "run.query_tokens=2"}), "run.query_tokens needs task.kind = \"decode\"");
  has(violations(decode, {"run.query_tokens=2", "output.selection=true"}), "for one query token a step");
  has(parse_error(decode, {"run.accept=some"}), "run.accept holds the string \"some\"; give \"all\" or a number");
}

TEST_CASE("draft tokens are accepted as often as asked for, up to the first that is rejected", "[tokens]") {
  const auto kept_share = [](double share, std::int32_t tokens) {
    const Acceptance a{tokens, repeats(share), tensor_key(7, "accept")};
    std::int64_t sum = 0;
    for (std::int64_t step = 0; step < 2000; ++step)
      for (std::int64_t b = 0; b < 5; ++b) {
        CHECK(kept_tokens(a, step, b) == kept_tokens(a, step, b));
        sum += kept_tokens(a, step, b);
      }
    return static_cast<double>(sum) / 10000;
  };
  CHECK(kept_share(0.0, 8) == 1.0);
  CHECK(kept_share(1.0, 8) == 8.0);
  // 1 + p + p^2 + ...; 10000 draws: three standard errors are below 0.06.
  CHECK(std::abs(kept_share(0.5, 4) - 1.875) < 0.05);
  CHECK(std::abs(kept_share(0.8, 8) - (1 - std::pow(0.8, 8)) / 0.2) < 0.09);
}

TEST_CASE("a trace is read as CSV or JSON, with the names of public traces", "[config][batch]") {
  const auto prompts = [](const char* text) {
    std::vector<std::int64_t> list;
    for (const Request& r : parse_trace(text, "trace")) list.insert(list.end(), {r.prompt, r.output});
    return list;
  };
  const std::vector<std::int64_t> expected = {4096, 128, 7, 0};
  CHECK(prompts("prompt,output\n4096,128\n7,0\n") == expected);
  CHECK(prompts("TIMESTAMP,ContextTokens,GeneratedTokens\r\n2023-11-16 18:17:03.97,4096,128\r\n\r\nx,7,0") == expected);
  CHECK(prompts("Model,\"Request tokens\",\"Response tokens\"\nGPT,4096,128\nGPT,7,0\n") == expected);
  CHECK(prompts("4096\n7\n") == std::vector<std::int64_t>{4096, 0, 7, 0});
  CHECK(prompts("[{\"prompt\": 4096, \"output\": 128}, {\"output\": 0, \"prompt\": 7}]") == expected);
  CHECK(prompts("{\"input_length\": 4096, \"output_length\": 128, \"hash_ids\": [1, {\"a\": 2}]}\n"
                "{\"input_length\": 7, \"output_length\": 0}\n") == expected);
  CHECK(prompts("[4096, 7]") == std::vector<std::int64_t>{4096, 0, 7, 0});
  CHECK(prompts("\xef\xbb\xbfprompt,output\r\n4096,128\r\n7,0\r\n") == expected);  // as spreadsheets write it
  CHECK(prompts("\xef\xbb\xbf[4096, 7]") == std::vector<std::int64_t>{4096, 0, 7, 0});
  CHECK(prompts("time,prompt,output\n\"Nov 16, 2023\",4096,128\n\"a \"\"b, 1\"\"\", \"7\" ,0\n") == expected);
  CHECK(prompts("text,prompt,output\r\n\"two\r\nlines\", 4096 ,128\r\n,7,0\r\n") == expected);
}

TEST_CASE("a trace that cannot be read gets one message with the line", "[config][batch]") {
  const auto refused = [](const char* text) {
    try {
      parse_trace(text, "t.csv");
    } catch (const UserError& error) {
      CHECK(error.code() == ExitCode::file);
      return std::string(error.what());
    }
    return std::string();
  };
  has(refused(""), "t.csv:1: no request");
  has(refused("prompt,output\n"), "t.csv:1: no request");
  has(refused("a,b\n1,2\n"), "t.csv:1: no column prompt");
  has(refused("prompt,output\n1,2\n3\n"), "t.csv:3: 1 cells in a table of 2 columns");
  has(refused("prompt,output\n1,2\n3,4,5\n"), "t.csv:3: 3 cells in a table of 2 columns");
  has(refused("prompt\n1,024\n"), "t.csv:2: 2 cells in a table of 1 columns; give one for each column, in quotes");
  has(refused("1024\n2,048\n"), "t.csv:2: 2 cells in a table of 1 columns");
  has(refused("id,prompt\n\"1,2\n"), "t.csv:2: a quote without its end");
  has(refused("id,prompt\n\"1\"2,3\n"), "t.csv:2: text after a closing quote");
  has(refused("id,prompt\n\"1\n2\",3\n4,x\n"), "t.csv:4: \"x\" is no number of tokens");
  has(refused("prompt;output\n1;2\n"), "give a header \"prompt,output\" with commas");
  has(refused("prompt,output\n1073741824,1\n"), "t.csv:2: 1073741824 + 1 tokens are too many");
  has(refused("[{\"prompt\": 1073741824, \"output\": 1073741824}]"), "tokens are too many");
  has(refused("prompt\n1\033[2J\n"), "\"1\\u001b[2J\" is no number");
  has(refused("prompt,output\n1,2\n-3,4\n"), "t.csv:3: \"-3\" is no number of tokens");
  has(refused("prompt,output\n1,2\nnan,4\n"), "t.csv:3: \"nan\" is no number of tokens");
  has(refused("prompt,output\n1,2\n0,4\n"), "t.csv:3: \"0\" is no number of tokens; give 1 to");
  has(refused("prompt\n99999999999999999999\n"), "t.csv:2: ");
  has(refused("[{\"prompt\": 1},\n {\"output\": 2}]"), "t.csv:2: an object without prompt");
  has(refused("[{\"prompt\": 1},\n {\"prompt\": NaN}]"), "t.csv:2: \"NaN\" is no number of tokens");
  has(refused("[1, 2"), "t.csv:1: no ']'");
  has(refused("{\"prompt\": 1"), "t.csv:1: no '}'");
  has(refused(std::string(1000, '[').c_str()), "without end");
}

TEST_CASE("a ragged batch counts as long as its longest sequence", "[config][batch]") {
  const auto problem = [](std::vector<std::string> settings, std::vector<Request> requests = {}) {
    settings.insert(settings.end(), {"model.dim=65536", "model.n_heads=4096", "model.d_k=4096"});  // 2^24 a position
    Config config = parse(decode, settings);
    config.batch.requests = std::move(requests);
    return message_of([&] { sweep(config); });
  };
  has(problem({"batch.context=[67108864, 1]"}), "2 sequences, the longest of 67108864 tokens, is too large");
  CHECK(problem({"batch.context=[1048576, 1]"}).empty());
  const std::vector<std::string> trace = {"batch.distribution=file", "batch.file=\"t\"", "run.batch=2"};
  has(problem(trace, {{1 << 26, 0}, {1, 0}}), "is too large for this model");
  CHECK(problem(trace, {{1 << 20, 0}, {1, 0}}).empty());
  has(problem({"batch.distribution=zipf", "batch.exponent=8", "run.batch=64", "run.context=65536"}),
      "lower run.batch, or the lengths in [batch]");
}

TEST_CASE("a trace gives a sequence its prompt and a part of its output", "[config][batch]") {
  Config config = parse(decode, {"batch.distribution=file", "batch.file=\"t\"", "run.batch=[2, 1]"});
  CHECK(violations(decode, {"batch.distribution=file", "batch.file=\"t\"", "run.batch=2"}).empty());
  config.batch.requests = {{100, 50}, {7, 0}, {9, 9}};
  const std::vector<Point> points = sweep(config);
  REQUIRE(points.size() == 2);
  CHECK((points[0].lengths[0] >= 100 && points[0].lengths[0] < 150));
  CHECK(points[0].lengths[1] == 7);
  CHECK(points[1].lengths == std::vector{points[0].lengths[0]});
  config.run.batch = {4};
  has(message_of([&] { sweep(config); }), "holds 3 requests, fewer than run.batch = 4");
}

TEST_CASE("the KV chunk of a point depends on its task and context, not on the ranks", "[config]") {
  const auto blocks = [](const char* kind, std::int64_t context, std::vector<std::string> more = {}) {
    const Config config = parse_config(std::string("[task]\nkind = \"") + kind + "\"\n", "chunks.toml", more);
    const Point point{context};
    CHECK(make_partition(config, point, 2, 0).chunk_tokens == kv_chunk_blocks(config, point) * config.nsa.l_sel);
    const std::vector<Parameter> list = parameters(config, point);
    const auto at = std::ranges::find(list, "parallel.kv_chunk_blocks", &Parameter::first);
    REQUIRE(at != list.end());
    CHECK(std::get<std::int64_t>(at->second) == kv_chunk_blocks(config, point));
    return kv_chunk_blocks(config, point);
  };
  CHECK(blocks("decode", 65536) == 16);
  CHECK(blocks("decode", 8192) == 16);
  CHECK(blocks("decode", 4096) == 8);  // 8 chunks
  CHECK(blocks("needle", 1024) == 8);
  CHECK(blocks("needle", 65536) == 16);
  CHECK(blocks("prefill", 8192) == 16);
  CHECK(blocks("prefill", 32768) == 32);
  CHECK(blocks("prefill", 65536) == 64);
  CHECK(blocks("prefill", 1048576) == 64);
  CHECK(blocks("prefill", 65536, {"nsa.l_sel=128"}) == 32);
  CHECK(blocks("prefill", 65536, {"parallel.kv_chunk_blocks=5"}) == 5);
  CHECK(blocks("prefill", 65536, {"parallel.kv_chunk_blocks=\"auto\""}) == 64);
}

TEST_CASE("every key is a parameter of a point under its own name", "[config]") {
  const Config config = parse(decode, {"run.context=[8,16]", "nsa.l=16", "parallel.kv=2"});
  const std::vector<Parameter> list = parameters(config, sweep(config)[1]);
  const auto value = [&](const std::string& key) {
    const auto at = std::find_if(list.begin(), list.end(), [&](const Parameter& p) { return p.first == key; });
    REQUIRE(at != list.end());
    return at->second;
  };
  CHECK(std::get<std::string>(value("task.kind")) == "decode");
  CHECK(std::get<std::int64_t>(value("run.context")) == 16);
  CHECK(std::get<std::int64_t>(value("nsa.l")) == 16);
  CHECK(std::get<std::string>(value("run.force_branch")) == "none");
  CHECK(std::get<std::string>(value("run.modes")) == "branches,total");
  CHECK(std::get<double>(value("model.rope_base")) == 10000.0);
  CHECK(std::get<std::int64_t>(value("run.check")) == 1);
  CHECK(std::get<std::string>(value("parallel.heads")) == "auto");
  CHECK(std::get<std::int64_t>(value("parallel.kv")) == 2);
  std::set<std::string> names;
  for (const Parameter& p : list) names.insert(p.first);
  CHECK(names.size() == list.size());
  const std::string toml = to_toml(config);  // one line a key, one line a section, one between sections
  CHECK(static_cast<std::size_t>(std::count(toml.begin(), toml.end(), '=')) == list.size());
}
