// Streams an answer, then shows a cancellation, a deadline, a session and an error.
// Usage: cpp_embed PYTHON BUNDLE PROMPT [PRECISION]
#include <algorithm>
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
  const std::string prompt = argv[3];
  try {
    const fusionroute::Interpreter python(argv[1]);
    const auto precision = argc > 4 ? std::optional<std::string>(argv[4]) : std::nullopt;
    fusionroute::Runtime runtime(argv[2], precision);

    // 1. Stream. The callback runs in this thread, without the GIL.
    fusionroute::Options options;
    options.max_new_tokens = 24;
    std::printf("tokens");
    const auto result = runtime.generate(prompt, options, [](const fusionroute::Token& token) {
      std::printf(" %lld:%s", static_cast<long long>(token.id), token.expert.c_str());
      std::fflush(stdout);
      return true;
    });
    std::printf("\nreason %s\n", result.finish_reason.c_str());

    // 2. Another thread cancels after the fifth token. Setting the flag needs no GIL.
    options.max_new_tokens = 400;
    options.temperature = 1.0;  // a longer text
    options.seed = 1;
    options.cancel.emplace();
    std::promise<void> fifth;
    std::thread other([wait = fifth.get_future(), flag = *options.cancel]() mutable {
      wait.wait();
      flag.set();
    });
    int seen = 0;
    const auto cancelled = runtime.generate(prompt, options, [&](const fusionroute::Token&) {
      if (++seen == 5) {
        fifth.set_value();
        other.join();  // so that this example prints the same on every machine
      }
      return true;
    });
    if (other.joinable()) {  // the text ended before the fifth token
      fifth.set_value();
      other.join();
    }
    std::printf("cancel %s after %d more\n", cancelled.finish_reason.c_str(), seen - 5);

    // 3. A deadline of 5 ms, too early for 400 tokens.
    options.cancel.reset();
    options.deadline = 0.005;
    const auto start = Clock::now();
    const auto late = runtime.generate(prompt, options);
    const double took = seconds_since(start);
    if (late.finish_reason == "deadline") {
      std::printf("deadline over by %.3f ms\n", 1e3 * (took - *options.deadline));
    } else {  // the text ended by itself
      std::printf("deadline unused, since the text ended by \"%s\" after %.3f ms\n", late.finish_reason.c_str(), 1e3 * took);
    }

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
