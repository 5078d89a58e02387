// Streams an answer, then shows a cancellation, a deadline, a session and an error.  cpp_embed PYTHON BUNDLE PROMPT [PRECISION]
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <future>
#include <memory>
#include <optional>
#include <string>
#include <thread>

#include "fusionroute.hpp"

using Clock = std::chrono::steady_clock;

static double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

int main(int argc, char** argv) {
  if (argc < 4) {
    std::fprintf(stderr, "usage: %s PYTHON BUNDLE PROMPT [PRECISION]\n", argv[0]);
    return 2;
  }
  const fusionroute::Interpreter python(argv[1]);
  const std::string prompt = argv[3];
  try {
    const auto precision = argc > 4 ? std::optional<std::string>(argv[4]) : std::nullopt;
    fusionroute::Runtime runtime(argv[2], precision);

    // 1. Stream. The callback runs in this thread, without the GIL.
    fusionroute::Options options;
    options.max_new_tokens = 24;
    const auto start = Clock::now();
    std::printf("tokens");
    const auto result = runtime.generate(prompt, options, [](const fusionroute::Token& token) {
      std::printf(" %lld:%s", static_cast<long long>(token.id), token.expert.c_str());
      std::fflush(stdout);
      return true;
    });
    const double each = seconds_since(start) / std::max<std::size_t>(result.token_ids.size(), 1);
    std::printf("\nreason %s\n", result.finish_reason.c_str());

    // 2. Another thread cancels after the fifth token. Setting the flag needs no GIL.
    options.max_new_tokens = 400;
    options.temperature = 1.0;  // a longer text
    options.seed = 1;
    options.cancel.emplace();
    std::promise<void> fifth;
    std::atomic<int> seen{0}, at_cancel{-1};
    std::thread other([&, wait = fifth.get_future(), flag = *options.cancel]() mutable {
      wait.wait();
      flag.set();
      at_cancel = seen.load();
    });
    bool signalled = false;
    const auto cancelled = runtime.generate(prompt, options, [&](const fusionroute::Token&) {
      if (++seen >= 5 && !signalled) {
        signalled = true;
        fifth.set_value();
      }
      return true;
    });
    if (!signalled) fifth.set_value();
    other.join();
    std::printf("cancel %s after %d more\n", cancelled.finish_reason.c_str(), seen.load() - at_cancel.load());

    // 3. A deadline of about ten tokens.
    options.cancel.reset();
    options.deadline = 10 * each;
    const auto begun = Clock::now();
    const auto late = runtime.generate(prompt, options);
    std::printf("deadline %s over by %.3f tokens\n", late.finish_reason.c_str(), (seconds_since(begun) - *options.deadline) / each);

    // 4. One token at a time, with its logits. They are not copied and outlive the session.
    auto session = std::make_unique<fusionroute::Session>(runtime.session());
    session->append(runtime.encode(prompt));
    const auto token = session->step();
    const fusionroute::Row row = session->logits();
    session.reset();
    const auto best = std::max_element(row.data(), row.data() + row.size()) - row.data();
    std::printf("session %lld best %lld\n", static_cast<long long>(token.id), static_cast<long long>(best));

    // 5. Errors are exceptions with a one-sentence message.
    try {
      runtime.generate(prompt, [] { fusionroute::Options wrong; wrong.temperature = -1; return wrong; }());
    } catch (const fusionroute::InputError& error) {
      std::printf("InputError %s\n", error.what());
    }
    try {
      runtime.generate(prompt, {}, [](const fusionroute::Token&) -> bool { throw std::logic_error("thrown by a callback"); });
    } catch (const std::logic_error& error) {
      std::printf("logic_error %s\n", error.what());
    }
    runtime.close();
    try {
      runtime.generate(prompt);
    } catch (const fusionroute::ClosedError& error) {
      std::printf("ClosedError %s\n", error.what());
    }
  } catch (const fusionroute::Error& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
}
