// FusionRoute bundles from C++17: load, generate, stream to a callback, cancel, step, and errors as exceptions.
//
// Any thread may call any function. Callers need not hold the GIL, and it is released while a model or a callback runs.
// Create one Interpreter in main() before everything else; it must outlive everything else.
// Use a Session from one thread at a time.
#pragma once

#include <pybind11/embed.h>
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <atomic>
#include <cstdint>
#include <exception>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

namespace fusionroute {
namespace py = pybind11;

// what() is the one-sentence message of the runtime.
struct Error : std::runtime_error { using std::runtime_error::runtime_error; };
struct BundleError : Error { using Error::Error; };
struct UnavailableError : Error { using Error::Error; };
struct InputError : Error { using Error::Error; };
struct ClosedError : Error { using Error::Error; };

namespace detail {

// Throws the C++ exception for a Python error. The caller holds the GIL.
[[noreturn]] inline void raise(const py::error_already_set& error) {
  const std::string sentence = py::str(error.value());
  // not imported here: the error may be that the package cannot be
  const py::dict modules = py::module_::import("sys").attr("modules");
  if (!modules.contains("fusionroute")) throw Error(error.what());
  const py::object package = modules["fusionroute"];
  if (error.matches(package.attr("ClosedError"))) throw ClosedError(sentence);
  if (error.matches(package.attr("InputError"))) throw InputError(sentence);
  if (error.matches(package.attr("UnavailableError"))) throw UnavailableError(sentence);
  if (error.matches(package.attr("BundleError"))) throw BundleError(sentence);
  if (error.matches(package.attr("FusionError"))) throw Error(sentence);
  throw Error(error.what());
}

// Runs `work` with the GIL held and turns Python errors into the exceptions above.
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
using SharedObject = std::shared_ptr<py::object>;
inline SharedObject share(py::object object) {
  return SharedObject(new py::object(std::move(object)), [](py::object* last) {
    py::gil_scoped_acquire gil;
    delete last;
  });
}

}  // namespace detail

// Starts Python without its signal handlers, and imports fusionroute.
// `python` is the interpreter of the environment that has fusionroute installed. Throws UnavailableError for another one.
class Interpreter {
 public:
  explicit Interpreter(const std::string& python) {
    const std::string expected = ": name the bin/python of an environment that has fusionroute installed.";
    std::error_code unreadable;
    if (!std::filesystem::is_regular_file(python, unreadable)) {
      throw UnavailableError("There is no Python at " + python + expected);
    }
    PyConfig config;
    PyConfig_InitPythonConfig(&config);
    config.install_signal_handlers = 0;
    config.parse_argv = 0;
    PyConfig_SetBytesString(&config, &config.program_name, python.c_str());
    PyConfig_SetBytesString(&config, &config.executable, python.c_str());
    try {
      python_ = std::make_unique<py::scoped_interpreter>(&config, 0, nullptr, false);
    } catch (const std::exception& error) {
      throw UnavailableError("The Python of " + python + " cannot be started (" + error.what() + ")" + expected);
    }
    try {
      py::module_::import("fusionroute");
    } catch (const py::error_already_set& error) {
      throw UnavailableError("The Python of " + python + " cannot import fusionroute (" + std::string(py::str(error.value())) + ")" + expected);
    }
    released_ = std::make_unique<py::gil_scoped_release>();
  }

 private:
  std::unique_ptr<py::scoped_interpreter> python_;
  std::unique_ptr<py::gil_scoped_release> released_;  // destroyed first, since the interpreter needs the GIL to end
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

// A flag that any thread can set without the GIL; copies share it.
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
  std::optional<std::string> expert;  // answers every token instead of the expert that the router chooses

  py::dict keywords() const {
    py::dict arguments;
    arguments["max_new_tokens"] = max_new_tokens;
    arguments["temperature"] = temperature;
    arguments["stop"] = stop;
    arguments["seed"] = seed;
    arguments["expert"] = expert;
    arguments["deadline"] = deadline;
    if (cancel) {
      const Cancel flag = *cancel;
      arguments["cancel"] = py::module_::import("types").attr("SimpleNamespace")(
          py::arg("is_set") = py::cpp_function([flag] { return flag.is_set(); }));
    }
    return arguments;
  }
};

// Called without the GIL, in the thread that generates.
// Returning false ends the text; an exception propagates out of `generate`.
using OnToken = std::function<bool(const Token&)>;

inline Token token_of(const py::handle& token) {
  return {token.attr("id").cast<std::int64_t>(), token.attr("text").cast<std::string>(), token.attr("expert").cast<std::string>(),
          token.attr("logprob").cast<double>(), token.attr("routing").cast<std::vector<float>>()};
}

// Fused logits of one step, not copied. Valid while this Row or a copy of it lives, even after the runtime is closed.
class Row {
 public:
  explicit Row(py::array_t<float> array)
      : data_(array.data()), size_(static_cast<std::size_t>(array.size())), owner_(detail::share(std::move(array))) {}
  const float* data() const noexcept { return data_; }
  std::size_t size() const noexcept { return size_; }
  float operator[](std::size_t id) const noexcept { return data_[id]; }

 private:
  const float* data_;
  std::size_t size_;
  detail::SharedObject owner_;
};

// One text, generated token by token.
class Session {
 public:
  explicit Session(py::object session) : session_(detail::share(std::move(session))) {}
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
  detail::SharedObject session_;
};

class Runtime {
 public:
  explicit Runtime(const std::string& bundle, const std::optional<std::string>& precision = {}, const std::string& device = "auto",
                   const std::optional<int>& threads = {}) {
    runtime_ = detail::with_gil([&] {
      const py::object type = py::module_::import("fusionroute").attr("FusionRuntime");
      return detail::share(type.attr("load")(bundle, precision, device, py::arg("threads") = threads));
    });
  }

  Result generate(const std::string& prompt, const Options& options = {}, const OnToken& on_token = {}) const {
    std::exception_ptr thrown;
    Result result = detail::with_gil([&] {
      py::dict keywords = options.keywords();
      if (on_token) {
        keywords["on_token"] = py::cpp_function([&](const py::object& object) {
          const Token token = token_of(object);
          py::gil_scoped_release release;
          try {
            return on_token(token);
          } catch (...) {
            thrown = std::current_exception();
            return false;
          }
        });
      }
      const py::object answer = runtime_->attr("generate")(prompt, **keywords);
      return Result{answer.attr("text").cast<std::string>(), answer.attr("finish_reason").cast<std::string>(),
                    answer.attr("token_ids").cast<std::vector<std::int64_t>>(), answer.attr("experts").cast<std::vector<std::string>>()};
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

  // Calls that still use the runtime, in any thread, throw ClosedError.
  void close() {
    detail::with_gil([&] { runtime_->attr("close")(); });
  }

 private:
  detail::SharedObject runtime_;
};

}  // namespace fusionroute
