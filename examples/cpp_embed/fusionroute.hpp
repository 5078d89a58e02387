// FusionRoute bundles from C++17: load, generate, stream to a callback, cancel, step, and errors as exceptions.
//
// Any thread may call anything here; no function needs the GIL held, and none holds it while a model runs or a callback is called.
// One Interpreter lives in main() before, and until after, everything else. A Session is used by one thread at a time.
#pragma once

#include <pybind11/embed.h>
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace fusionroute {
namespace py = pybind11;

// what() is the runtime's one sentence.
struct Error : std::runtime_error { using std::runtime_error::runtime_error; };
struct BundleError : Error { using Error::Error; };
struct UnavailableError : Error { using Error::Error; };
struct InputError : Error { using Error::Error; };
struct ClosedError : Error { using Error::Error; };

namespace detail {

// Throws what a Python error is in C++. The GIL is held.
[[noreturn]] inline void raise(const py::error_already_set& error) {
  const py::module_ package = py::module_::import("fusionroute");
  const std::string sentence = py::str(error.value());
  if (error.matches(package.attr("ClosedError"))) throw ClosedError(sentence);
  if (error.matches(package.attr("InputError"))) throw InputError(sentence);
  if (error.matches(package.attr("UnavailableError"))) throw UnavailableError(sentence);
  if (error.matches(package.attr("BundleError"))) throw BundleError(sentence);
  if (error.matches(package.attr("FusionError"))) throw Error(sentence);
  throw Error(error.what());
}

// Runs `work` with the GIL and turns Python's errors into the exceptions above.
template <class Work>
auto with_gil(Work&& work) {
  py::gil_scoped_acquire gil;
  try {
    return work();
  } catch (const py::error_already_set& error) {
    raise(error);
  }
}

// A Python object that C++ may copy and destroy without the GIL.
using Held = std::shared_ptr<py::object>;
inline Held hold(py::object object) {
  return Held(new py::object(std::move(object)), [](py::object* held) {
    py::gil_scoped_acquire gil;
    delete held;
  });
}

}  // namespace detail

// Starts Python, which leaves signals alone. `python` is the interpreter of the virtual environment that has fusionroute installed.
class Interpreter {
 public:
  explicit Interpreter(const std::string& python) {
    PyConfig config;
    PyConfig_InitPythonConfig(&config);
    config.install_signal_handlers = 0;
    config.parse_argv = 0;
    PyConfig_SetBytesString(&config, &config.program_name, python.c_str());
    PyConfig_SetBytesString(&config, &config.executable, python.c_str());
    python_ = std::make_unique<py::scoped_interpreter>(&config, 0, nullptr, false);
    released_ = std::make_unique<py::gil_scoped_release>();
  }

 private:
  std::unique_ptr<py::scoped_interpreter> python_;
  std::unique_ptr<py::gil_scoped_release> released_;  // destroyed first: the interpreter ends with the GIL held
};

struct Token {
  std::int64_t id;
  std::string text, expert;
  double logprob;
  std::vector<float> routing;  // one score per expert
};

struct Result {
  std::string text, finish_reason;  // "stop", "length", "cancelled", "deadline"
  std::vector<std::int64_t> token_ids;
  std::vector<std::string> experts;
};

// A flag that any thread sets without waiting for the GIL; copies share it.
class Cancel {
 public:
  void set() noexcept { flag_->store(true); }
  bool is_set() const noexcept { return flag_->load(); }

 private:
  std::shared_ptr<std::atomic<bool>> flag_ = std::make_shared<std::atomic<bool>>(false);
};

struct Options {
  int max_new_tokens = 128;
  std::optional<double> deadline;  // seconds from the call
  std::optional<Cancel> cancel;
  double temperature = 0.0;  // 0: greedy
  std::optional<std::uint64_t> seed;
  std::vector<std::string> stop;
  std::optional<std::string> expert;  // answers every token instead of the routed one

  py::dict keywords() const {
    py::dict found;
    found["max_new_tokens"] = max_new_tokens;
    found["temperature"] = temperature;
    found["stop"] = stop;
    found["seed"] = seed;
    found["expert"] = expert;
    found["deadline"] = deadline;
    if (cancel) {
      const Cancel flag = *cancel;
      found["cancel"] = py::module_::import("types").attr("SimpleNamespace")(
          py::arg("is_set") = py::cpp_function([flag] { return flag.is_set(); }));
    }
    return found;
  }
};

// Called without the GIL in the thread that generates; false ends the text. What it throws comes out of `generate`.
using OnToken = std::function<bool(const Token&)>;

inline Token token_of(const py::handle& token) {
  return {token.attr("id").cast<std::int64_t>(), token.attr("text").cast<std::string>(), token.attr("expert").cast<std::string>(),
          token.attr("logprob").cast<double>(), token.attr("routing").cast<std::vector<float>>()};
}

// Fused logits of one step, without a copy. Valid as long as this or a copy of it lives, also after the runtime was closed.
class Row {
 public:
  explicit Row(py::array_t<float> array) : data_(array.data()), size_(static_cast<std::size_t>(array.size())), held_(detail::hold(std::move(array))) {}
  const float* data() const noexcept { return data_; }
  std::size_t size() const noexcept { return size_; }
  float operator[](std::size_t id) const noexcept { return data_[id]; }

 private:
  const float* data_;
  std::size_t size_;
  detail::Held held_;
};

// One text, a token at a time.
class Session {
 public:
  explicit Session(py::object session) : session_(detail::hold(std::move(session))) {}
  void append(const std::vector<std::int64_t>& ids) {
    detail::with_gil([&] { session_->attr("append")(ids); });
  }
  Token step() {
    return detail::with_gil([&] { return token_of(session_->attr("step")()); });
  }
  void rewind(std::size_t tokens) {
    detail::with_gil([&] { session_->attr("rewind")(tokens); });
  }
  Row logits() const {
    return detail::with_gil([&] { return Row(session_->attr("logits").cast<py::array_t<float>>()); });
  }

 private:
  detail::Held session_;
};

class Runtime {
 public:
  explicit Runtime(const std::string& bundle, const std::optional<std::string>& precision = {}, const std::string& device = "auto",
                   const std::optional<int>& threads = {}) {
    runtime_ = detail::with_gil([&] {
      const py::object type = py::module_::import("fusionroute").attr("FusionRuntime");
      return detail::hold(type.attr("load")(bundle, precision, device, py::arg("threads") = threads));
    });
  }

  Result generate(const std::string& prompt, const Options& options = {}, const OnToken& on_token = {}) const {
    std::exception_ptr thrown;
    Result result = detail::with_gil([&] {
      py::dict keywords = options.keywords();
      if (on_token) {
        keywords["on_token"] = py::cpp_function([&](const py::object& object) {
          const Token token = token_of(object);
          py::gil_scoped_release free;
          try {
            return on_token(token);
          } catch (...) {
            thrown = std::current_exception();
            return false;
          }
        });
      }
      const py::object found = runtime_->attr("generate")(prompt, **keywords);
      return Result{found.attr("text").cast<std::string>(), found.attr("finish_reason").cast<std::string>(),
                    found.attr("token_ids").cast<std::vector<std::int64_t>>(), found.attr("experts").cast<std::vector<std::string>>()};
    });
    if (thrown) std::rethrow_exception(thrown);
    return result;
  }

  std::vector<std::int64_t> encode(const std::string& text) const {
    return detail::with_gil([&] { return runtime_->attr("encode")(text).cast<std::vector<std::int64_t>>(); });
  }

  Session session() const {
    return detail::with_gil([&] { return Session(runtime_->attr("session")()); });
  }

  // Everybody who still uses the runtime, in any thread, ends with ClosedError.
  void close() {
    detail::with_gil([&] { runtime_->attr("close")(); });
  }

 private:
  detail::Held runtime_;
};

}  // namespace fusionroute
