// Routes: the table, its overrides, the guards, and the fallback of an implementation that does not run.

#include <cstdlib>
#include <sstream>

#include "catch.hpp"
#include "kernels/host/runtime/host.hpp"
#include "nsa/routing/router.hpp"

using namespace nsa;

namespace {

RouteKey cuda(int capability, Branch branch, std::int64_t length, DType dtype = DType::bf16) {
  return {BackendKind::cuda, capability, Phase::decode, branch, dtype, 128, 128, length};
}

Config with(const std::string& text) { return parse_config("[task]\nkind = \"decode\"\n" + text, "in.toml", {}); }

/// The message of the UserError.
template <class Work>
std::string refusal(Work&& work) {
  try {
    work();
  } catch (const UserError& error) {
    return error.what();
  }
  return "nothing was thrown";
}

struct Variable {
  Variable(const char* variable, const char* value) : name(variable) { setenv(variable, value, 1); }
  ~Variable() { unsetenv(name); }
  const char* name;
};

// A backend whose kernels say which of them ran.
std::string ran;
bool may_launch = true;
bool any(const LayerShape&, const QueryTile&) { return true; }
bool none(const LayerShape&, const QueryTile&) { return false; }
void run_sdpa(const AttendArgs&, Stream*) { ran += "s"; }
void run_fused(const AttendArgs&, Stream*) {
  if (!may_launch) throw LaunchError("no room");
  ran += "f";
}
std::size_t large(const LayerShape&, const QueryTile&, const AttentionPolicy&) { return 1000; }
constexpr AttendKernel willing[] = {
    {"fused", any, run_fused},
    {.name = "sdpa", .accepts = any, .run = run_sdpa, .variant = [](const AttendArgs&) { return "sdpa_gemm"; }},
    {"masked", any, run_sdpa, nullptr, large}};
constexpr AttendKernel refusing[] = {{"fused", none, run_fused}, {"sdpa", any, run_sdpa}};

KernelTable table_of(std::span<const AttendKernel> list) {
  KernelTable table{};
  for (auto& branch : table.attend) branch = list;
  table.scratch_bytes = [](const LayerShape&, const QueryTile&, const AttentionPolicy&) -> std::size_t { return 10; };
  return table;
}

const QueryTile tile{0, 1, 1, nullptr, 100};

}  // namespace

TEST_CASE("the table: each choose_route has its reason") {
  for (const Branch branch : {cmp, sel, win}) {
    CHECK(default_route(cuda(90, branch, 1024)).name == "fused");
    for (const std::int64_t length : {1, 1024, 1 << 20}) CHECK(default_route(cuda(89, branch, length)).name == "sdpa");
    CHECK(default_route(cuda(80, branch, 1024)).name == "sdpa");
    CHECK(default_route({BackendKind::cuda, 90, Phase::prefill, branch, DType::f32, 64, 64, 1024}).name == "fused");
    CHECK(default_route(cuda(80, branch, 1024)).reason.find("not measured") == 0);
    CHECK(default_route(cuda(89, branch, 1)).reason.find("RTX 4090") != std::string::npos);
    CHECK(default_route({BackendKind::host, 0, Phase::prefill, branch, DType::f32, 6, 10, 5}).name == "fused");
    // Beyond the tensor-core kernels a prefill is sdpa_gemm, a decode step fused.
    CHECK(default_route({BackendKind::cuda, 90, Phase::prefill, branch, DType::bf16, 256, 256, 5}).name == "fused");
    CHECK(default_route({BackendKind::cuda, 90, Phase::prefill, branch, DType::bf16, 272, 256, 5}).name == "sdpa_gemm");
    CHECK(default_route({BackendKind::cuda, 90, Phase::prefill, branch, DType::f16, 100, 100, 5}).name == "sdpa_gemm");
    CHECK(default_route({BackendKind::cuda, 90, Phase::decode, branch, DType::bf16, 256, 256, 5}).name == "fused");
  }
}

TEST_CASE("environment over [route] over [runtime] over the table") {
  const RouteKey q = cuda(90, sel, 1024);
  RouteEnvironment environment;
  CHECK(choose_route(q, with(""), environment).name == "fused");
  CHECK(choose_route(q, with("[runtime]\nsel_triton_min_L = 4096\n"), environment).name == "sdpa");
  CHECK(choose_route(q, with("[runtime]\nsel_triton_min_L = 4096\n[route]\nsel = \"fused\"\n"), environment).name ==
        "fused");
  environment.implementation[sel] = "masked";
  const RouteChoice masked = choose_route(q, with("[route]\nsel = \"sdpa\"\n"), environment);
  CHECK(masked.name == "masked");
  CHECK(masked.reason == "asked for by NSA_ROUTE_SEL");
  environment.implementation[sel] = "auto";
  CHECK(choose_route(q, with("[route]\nsel = \"sdpa\"\n"), environment).name == "fused");
}

TEST_CASE("the thresholds count K/V rows that a query attends") {
  const RouteEnvironment none_set;
  const Config at_1024 = with("[runtime]\nsel_triton_min_L = 1024\nfa2_min_len_win = 512\nfa2_min_len_cmp = 32\n");
  CHECK(choose_route(cuda(90, sel, 1023), at_1024, none_set).name == "sdpa");
  CHECK(choose_route(cuda(90, sel, 1024), at_1024, none_set).name == "fused");
  CHECK(choose_route(cuda(90, win, 511), at_1024, none_set).name == "fused");
  CHECK(choose_route(cuda(90, win, 512), at_1024, none_set).name == "flash");
  CHECK(choose_route(cuda(90, cmp, 31), at_1024, none_set).name == "fused");
  CHECK(choose_route(cuda(90, cmp, 32), at_1024, none_set).name == "flash");
  const Config theirs = with("[runtime]\nsel_triton_min_L = 4096\nfa2_min_len_win = 999999\nfa2_min_len_cmp = -1\n");
  CHECK(choose_route(cuda(90, sel, 1024), theirs, none_set).name == "sdpa");  // n = 16 blocks of 64: never reached
  CHECK(choose_route(cuda(90, win, 512), theirs, none_set).name == "fused");
  CHECK(choose_route(cuda(90, cmp, 65536), theirs, none_set).name == "fused");

  const BlockRules paper;
  CHECK(attended_rows(paper, sel, 65536) == 1024);
  CHECK(attended_rows(paper, sel, 100) == 100);
  CHECK(attended_rows(paper, win, 65536) == 512);
  CHECK(attended_rows(paper, cmp, 1024) == 63);
}

TEST_CASE("a guard forbids a route unless it is forced, and the reason says so") {
  RouteEnvironment environment;
  const Config fused = with("[route]\nsel = \"fused\"\n"), flash = with("[runtime]\nfa2_min_len_win = 1\n");
  const std::string message = refusal([&] { choose_route(cuda(89, sel, 1024), fused, environment); });
  CHECK(message.find("route.sel = \"fused\" (custom kernels are off on compute capability 8.9") == 0);
  CHECK(message.find("; set NSA_FORCE=1") != std::string::npos);
  CHECK(choose_route(cuda(89, sel, 1024), with("[route]\nsel = \"masked\"\n"), environment).name == "masked");
  const RouteChoice held = choose_route(cuda(89, win, 512), flash, environment);  // not requested by name: no error
  CHECK(held.name == "sdpa");
  CHECK(held.reason.find("8.9") != std::string::npos);
  environment.implementation[win] = "flash";
  CHECK(refusal([&] { choose_route(cuda(89, win, 512), with(""), environment); }).find("NSA_ROUTE_WIN = \"flash\"") ==
        0);
  environment.force = true;
  CHECK(choose_route(cuda(89, win, 512), with(""), environment).reason.find("forced") != std::string::npos);
  CHECK(choose_route(cuda(89, sel, 1024), fused, environment).name == "fused");
}

TEST_CASE("the environment is read, and what it may not hold is named") {
  {
    const Variable route("NSA_ROUTE_CMP", "sdpa"), force("NSA_FORCE", "1");
    const RouteEnvironment environment = route_environment();
    CHECK(environment.implementation[cmp] == "sdpa");
    CHECK(environment.implementation[sel].empty());
    CHECK(environment.force);
  }
  CHECK_FALSE(route_environment().force);
  const Variable bad("NSA_ROUTE_SEL", "flash");
  CHECK(refusal([] { route_environment(); }).find("NSA_ROUTE_SEL=flash") == 0);
  unsetenv("NSA_ROUTE_SEL");
  const Variable force("NSA_FORCE", "yes");
  CHECK(refusal([] { route_environment(); }).find("NSA_FORCE=yes") == 0);
}

TEST_CASE("what refuses the shape is replaced by sdpa and counted") {
  const KernelTable table = table_of(refusing);
  const Backend backend{BackendKind::host, &table, &host_device()};
  Routes routes;
  routes.choose(backend, with("[route]\nsel = \"fused\"\n"), Phase::decode, LayerShape{}, tile);
  ran.clear();
  for (int call = 0; call < 3; ++call) routes.of(Phase::decode, sel).run(sel, {}, nullptr);
  CHECK(ran == "sss");
  const std::vector<std::string> lines = routes.fallbacks(Phase::decode);
  REQUIRE(lines.size() == 3);  // the other branches run fused by default, which refuses too
  CHECK(lines[1].find("sel: fused -> sdpa: refuses this shape (Dk = 64, Dv = 64, fp32, 100 positions)") == 0);
  CHECK(lines[1].find("(3 calls)") != std::string::npos);
}

TEST_CASE("a launch that fails is served by sdpa, from then on too; another error is not") {
  const KernelTable table = table_of(willing);
  const Backend backend{BackendKind::host, &table, &host_device()};
  Routes routes;
  routes.choose(backend, with(""), Phase::decode, LayerShape{}, tile);
  Route& route = routes.of(Phase::decode, sel);
  ran.clear();
  route.run(sel, {}, nullptr);
  may_launch = false;
  route.run(sel, {}, nullptr);
  may_launch = true;
  route.run(sel, {}, nullptr);
  CHECK(ran == "fss");
  CHECK(routes.fallbacks(Phase::decode) == std::vector<std::string>{"sel: fused -> sdpa: no room (2 calls)"});
  CHECK(routes.fallbacks(Phase::prefill) == std::vector<std::string>{"decode sel: fused -> sdpa: no room (2 calls)"});
  CHECK(route.ran == std::vector<std::string>{"fused", "sdpa_gemm"});
  const AttendKernel broken{"fused", any,
                            [](const AttendArgs&, Stream*) { throw UserError("lost", ExitCode::device); }};
  Route other{&broken, &willing[1], "fused", "", "", 0};
  CHECK_THROWS_AS(other.run(sel, {}, nullptr), UserError);
  CHECK(other.fallbacks == 0);
}

TEST_CASE("a name that the backend lacks, and scratch for one that wants more") {
  const KernelTable table = table_of(willing);
  const Backend backend{BackendKind::host, &table, &host_device()};
  Routes routes;
  CHECK(refusal([&] {
          routes.choose(backend, with("[route]\nwin = \"flash\"\n"), Phase::decode, LayerShape{}, tile);
        }) == "route.win = \"flash\" (this backend has fused, sdpa, masked); choose one of these or \"auto\"");
  routes.choose(backend, with("[runtime]\nfa2_min_len_win = 1\n"), Phase::decode, LayerShape{}, tile);
  CHECK(std::string(routes.of(Phase::decode, win).kernel->name) == "sdpa");  // not requested by name
  CHECK(routes.fallbacks(Phase::decode).empty());
  CHECK(routes.scratch_bytes(table, Phase::decode, LayerShape{}, tile, {}) == 10);
  routes.choose(backend, with("[route]\nsel = \"masked\"\n"), Phase::decode, LayerShape{}, tile);
  CHECK(routes.scratch_bytes(table, Phase::decode, LayerShape{}, tile, {}) == 1000);
}

TEST_CASE("the routes are printed without a device") {
  std::ostringstream out;
  print_routes(out);
  for (const char* part :
       {"host", "compute capability 8.9", "compute capability 9.0", "prefill", "decode", "sdpa", "fused"})
    CHECK(out.str().find(part) != std::string::npos);
}
