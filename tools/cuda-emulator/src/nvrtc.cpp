// NVRTC on top of g++: a program becomes a shared object for this processor.
//
// g++ preprocesses the program behind device/cuda.cuh, with `__global__` and `__shared__` left as
// they are. From that text come the kernels and the names of dynamic shared memory; a second run
// compiles it together with a table of the kernels. What was compiled before is kept beside this
// library, so that many short processes do not compile the same kernels again.

#include <dlfcn.h>
#include <fcntl.h>
#include <spawn.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cctype>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "../device/runtime.cuh"

#define NVRTC_API extern "C" __attribute__((visibility("default")))

namespace {

namespace fs = std::filesystem;
using std::string;

enum Result : int {
    success = 0,
    out_of_memory = 1,
    program_creation_failure = 2,
    invalid_input = 3,
    invalid_program = 4,
    invalid_option = 5,
    compilation_error = 6,
};

constexpr int architectures[] = {75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121};

struct Header {
    string name, text;
};

struct Program {
    string name, source;
    std::vector<Header> headers;
    string log;
    std::vector<char> image;
};

struct Options {
    string architecture = "90";
    // For g++.
    std::vector<string> arguments;
};

// Folder of this library.
fs::path home() {
    Dl_info info;
    if (!dladdr((const void*)&home, &info)) return ".";
    return fs::canonical(info.dli_fname).parent_path();
}

// "--name=value" and "-name value" as NVRTC takes them; those without a meaning here are dropped.
Options read_options(int count, const char* const* texts) {
    Options options;
    auto value_of = [&](int& i, std::initializer_list<const char*> names, string& value) {
        string text = texts[i];
        for (string name : names) {
            if (text.starts_with(name + "=")) {
                value = text.substr(name.size() + 1);
                return true;
            }
            if (text == name && i + 1 < count) {
                value = texts[++i];
                return true;
            }
        }
        return false;
    };
    for (int i = 0; i < count; ++i) {
        string text = texts[i], value;
        if (value_of(i, {"--gpu-architecture", "-arch"}, value)) {
            options.architecture.clear();
            for (char c : value) {
                if (isdigit((unsigned char)c)) options.architecture += c;
            }
        } else if (value_of(i, {"--define-macro", "-D"}, value)) {
            options.arguments.push_back("-D" + value);
        } else if (value_of(i, {"--include-path", "-I"}, value)) {
            options.arguments.push_back("-I" + value);
        } else if (text.starts_with("-D") || text.starts_with("-I")) {
            options.arguments.push_back(text);
        } else if (text == "--fmad=false" || text == "-fmad=false") {
            options.arguments.push_back("-ffp-contract=off");
        }
    }
    return options;
}

string read_file(const fs::path& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
}

void write_file(const fs::path& path, const string& text) {
    std::ofstream(path, std::ios::binary) << text;
}

// Runs g++ in a folder; what it prints is added to the log.
bool run_compiler(const fs::path& folder, std::vector<string> arguments, string& log) {
    fs::path output = folder / "output.txt";
    // Within the folder, so that messages name the files as the program does.
    string script = "cd \"$0\" && exec g++ \"$@\"";
    std::vector<string> words = {"sh", "-c", script, folder.string()};
    words.insert(words.end(), arguments.begin(), arguments.end());
    std::vector<char*> pointers;
    for (string& word : words) pointers.push_back(word.data());
    pointers.push_back(nullptr);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_addopen(&actions, 1, output.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
    posix_spawn_file_actions_adddup2(&actions, 1, 2);
    pid_t process;
    int error = posix_spawn(&process, "/bin/sh", &actions, nullptr, pointers.data(), environ);
    posix_spawn_file_actions_destroy(&actions);
    int status = 1;
    if (error == 0) waitpid(process, &status, 0);
    if (error != 0) log += string("cannot run g++: ") + strerror(error) + "\n";
    log += read_file(output);
    return error == 0 && WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

bool is_word(char c) { return isalnum((unsigned char)c) || c == '_'; }

// Reads the preprocessed text word by word; strings and line markers are skipped.
class Scanner {
  public:
    explicit Scanner(const string& text) : text(text) {}

    // The next word or mark, empty at the end; `start` is where it begins.
    string next() {
        for (;;) {
            while (at < text.size() && isspace((unsigned char)text[at])) ++at;
            if (at < text.size() && text[at] == '#' && (at == 0 || text[at - 1] == '\n')) {
                at = std::min(text.find('\n', at), text.size());
            } else if (at < text.size() && (text[at] == '"' || text[at] == '\'')) {
                skip_quoted();
            } else {
                break;
            }
        }
        start = at;
        if (at == text.size()) return "";
        if (!is_word(text[at])) return string(1, text[at++]);
        while (at < text.size() && is_word(text[at])) ++at;
        return text.substr(start, at - start);
    }

    // The text between "(" and its ")", when the next mark is "(".
    string parentheses() {
        if (next() != "(") return "";
        size_t first = at;
        for (int depth = 1; depth > 0;) {
            string word = next();
            if (word.empty()) return "";
            depth += word == "(" ? 1 : word == ")" ? -1 : 0;
        }
        return text.substr(first, start - first);
    }

    size_t start = 0;

  private:
    const string& text;
    size_t at = 0;

    void skip_quoted() {
        char quote = text[at++];
        // An apostrophe within a number separates digits.
        if (quote == '\'' && at >= 2 && isalnum((unsigned char)text[at - 2])) return;
        while (at < text.size() && text[at] != quote) at += text[at] == '\\' ? 2 : 1;
        at = std::min(at + 1, text.size());
    }
};

struct KernelName {
    string name, bounds;
};

struct Declarations {
    std::vector<KernelName> kernels;
    std::vector<string> dynamic_shared;
};

// Reads on behind `__global__`: the kernel's name stands before its parameters.
KernelName read_kernel(Scanner& scanner) {
    KernelName kernel;
    for (string word = scanner.next(); !word.empty(); word = scanner.next()) {
        if (word == "__launch_bounds__") {
            kernel.bounds = scanner.parentheses();
        } else if (word == "__attribute__") {
            scanner.parentheses();
        } else if (word == "(") {
            break;
        } else {
            kernel.name = word;
        }
    }
    return kernel;
}

Declarations find_declarations(const string& text) {
    Declarations found;
    Scanner scanner(text);
    string before;
    for (string word = scanner.next(); !word.empty(); word = scanner.next()) {
        if (word == "__global__") {
            KernelName kernel = read_kernel(scanner);
            bool known = false;
            for (KernelName& other : found.kernels) known |= other.name == kernel.name;
            if (!known) found.kernels.push_back(kernel);
        } else if (word == "__shared__" && before == "extern") {
            string name;
            while (!(word = scanner.next()).empty() && word != "[") name = word;
            found.dynamic_shared.push_back(name);
        }
        before = word;
    }
    return found;
}

// `extern __shared__` declares a symbol of the assembly below; any other `__shared__` is a
// variable that outlives the call.
string mark_dynamic_shared(string text) {
    string result;
    size_t copied = 0;
    Scanner scanner(text);
    string before;
    for (string word = scanner.next(); !word.empty(); word = scanner.next()) {
        if (word == "__shared__" && before == "extern") {
            result += text.substr(copied, scanner.start - copied) + "__dynamic_shared__";
            copied = scanner.start + word.size();
        }
        before = word;
    }
    return result + text.substr(copied);
}

string program_text(const string& preprocessed) {
    Declarations found = find_declarations(preprocessed);
    string text =
        "#define __global__ __attribute__((visibility(\"hidden\"), used))\n"
        "#define __shared__ static\n"
        "#define __dynamic_shared__ __attribute__((visibility(\"hidden\")))\n"
        "#define __launch_bounds__(...)\n";
    text += mark_dynamic_shared(preprocessed);
    text += "\n#line 1 \"kernel table\"\n";
    text += "extern \"C\" __attribute__((visibility(\"default\"))) "
            "const emulator::Kernel emulator_kernels[] = {\n";
    for (const KernelName& kernel : found.kernels) {
        text += "emulator::entry<&" + kernel.name + ">(\"" + kernel.name +
                "\", emulator::launch_bounds(" + kernel.bounds + ")),\n";
    }
    text += "{}};\n";
    // Every name of dynamic shared memory stands for the same room.
    text += "asm(R\"(\n.pushsection .bss\n.balign " + std::to_string(emulator::page_size) +
            "\n.globl emulator_dynamic_shared\nemulator_dynamic_shared:\n";
    for (const string& name : found.dynamic_shared) {
        text += ".globl " + name + "\n.hidden " + name + "\n" + name + ":\n";
    }
    text += ".zero " + std::to_string(emulator::dynamic_shared_room) + "\n.popsection\n)\");\n";
    return text;
}

void write_sources(const Program& program, const fs::path& folder) {
    write_file(folder / program.name, program.source);
    for (const Header& header : program.headers) {
        fs::path path = folder / fs::path(header.name).relative_path();
        if (path.filename() == "ptx.cuh") continue;
        fs::create_directories(path.parent_path());
        write_file(path, header.text);
    }
}

Result compile_in(Program& program, const Options& options, const fs::path& folder) {
    write_sources(program, folder);
    string device = (home() / "device").string();
    std::vector<string> common = {"-std=gnu++20", "-O2", "-march=x86-64-v3", "-x", "c++", "-w"};
    std::vector<string> first = common;
    for (string argument : {string("-E"), string("-D__CUDACC__"), string("-D__CUDACC_RTC__"),
                            "-D__CUDA_ARCH__=" + options.architecture + "0", string("-I."),
                            "-I" + device, string("-include"), device + "/cuda.cuh", program.name,
                            string("-o"), string("preprocessed.txt")}) {
        first.push_back(argument);
    }
    first.insert(first.end(), options.arguments.begin(), options.arguments.end());
    if (!run_compiler(folder, first, program.log)) return compilation_error;
    write_file(folder / "program.txt", program_text(read_file(folder / "preprocessed.txt")));
    std::vector<string> second = common;
    // Kernels reinterpret memory freely; their variables must stay apart from other programs'.
    for (const char* argument :
         {"-fPIC", "-shared", "-nostartfiles", "-fvisibility=hidden", "-fno-gnu-unique",
          "-fno-strict-aliasing", "-fno-math-errno", "-fno-trapping-math", "-fno-exceptions",
          "-fno-asynchronous-unwind-tables", "-fno-ipa-reference",
          "-fsanitize=alignment,bounds-strict,shift-exponent,integer-divide-by-zero,unreachable",
          "-nostdlib", "-g1", "program.txt", "-o", "program.so", "-lm", "-lgcc"}) {
        second.push_back(argument);
    }
    for (const string& argument : options.arguments) {
        if (argument.starts_with("-f")) second.push_back(argument);
    }
    if (!run_compiler(folder, second, program.log)) return compilation_error;
    string image = read_file(folder / "program.so");
    program.image.assign(image.begin(), image.end());
    return success;
}

// FNV-1a of a sequence of texts.
class Hash {
  public:
    void add(const string& text) {
        for (unsigned char c : text) value = (value ^ c) * prime;
        value = (value ^ 256) * prime;
    }

    string name() const {
        char text[40];
        snprintf(text, sizeof text, "%016llx%016llx", (unsigned long long)(value >> 64),
                 (unsigned long long)value);
        return text;
    }

    uint64_t low() const { return (uint64_t)value; }

  private:
    using Wide = unsigned __int128;
    static constexpr Wide prime = ((Wide)1 << 88) | 0x13b;
    Wide value = ((Wide)0x6c62272e07bb0142ull << 64) | 0x62b821756295c58dull;
};

// Of what turns programs into images: this library and its headers.
const Hash& compiler_hash() {
    static const Hash hash = [] {
        Hash hash;
        for (const char* name : {"bits", "cuda", "math", "ptx", "runtime", "threads"}) {
            hash.add(read_file(home() / "device" / (string(name) + ".cuh")));
        }
        hash.add(read_file(home() / "libnvrtc.so"));
        return hash;
    }();
    return hash;
}

string cache_name(const Program& program, const Options& options) {
    Hash hash = compiler_hash();
    hash.add(program.name);
    hash.add(program.source);
    for (const Header& header : program.headers) hash.add(header.name), hash.add(header.text);
    hash.add(options.architecture);
    for (const string& argument : options.arguments) hash.add(argument);
    return hash.name();
}

Result compile(Program& program, const Options& options) {
    fs::path cache = home() / "cache", cached = cache / cache_name(program, options);
    string image = read_file(cached);
    if (!image.empty()) {
        program.image.assign(image.begin(), image.end());
        return success;
    }
    string folder = (fs::temp_directory_path() / "cuda-emulator-XXXXXX").string();
    if (!mkdtemp(folder.data())) {
        program.log = "cannot make a folder for temporary files\n";
        return compilation_error;
    }
    Result result = compile_in(program, options, folder);
    std::error_code ignored;
    if (result == success) {
        fs::create_directories(cache, ignored);
        fs::path fresh = cache / fs::path(folder).filename();
        write_file(fresh, string(program.image.begin(), program.image.end()));
        fs::rename(fresh, cached, ignored);
    }
    fs::remove_all(folder, ignored);
    return result;
}

Result image_size(Program* program, size_t* size) {
    if (!program) return invalid_program;
    *size = program->image.size();
    return program->image.empty() ? invalid_program : success;
}

Result copy_image(Program* program, char* out) {
    if (!program || program->image.empty()) return invalid_program;
    memcpy(out, program->image.data(), program->image.size());
    return success;
}

}  // namespace

// The minor version changes with the emulator: programs keep compiled images by version, and must
// neither use those of an earlier emulator nor take ours for real ones.
NVRTC_API int nvrtcVersion(int* major, int* minor) {
    *major = 13;
    *minor = 1000 + (int)(compiler_hash().low() % 1000000000);
    return success;
}

NVRTC_API const char* nvrtcGetErrorString(int result) {
    switch (result) {
        case success: return "NVRTC_SUCCESS";
        case out_of_memory: return "NVRTC_ERROR_OUT_OF_MEMORY";
        case program_creation_failure: return "NVRTC_ERROR_PROGRAM_CREATION_FAILURE";
        case invalid_input: return "NVRTC_ERROR_INVALID_INPUT";
        case invalid_program: return "NVRTC_ERROR_INVALID_PROGRAM";
        case invalid_option: return "NVRTC_ERROR_INVALID_OPTION";
        case compilation_error: return "NVRTC_ERROR_COMPILATION";
        default: return "NVRTC_ERROR unknown";
    }
}

NVRTC_API int nvrtcGetNumSupportedArchs(int* count) {
    *count = (int)std::size(architectures);
    return success;
}

NVRTC_API int nvrtcGetSupportedArchs(int* out) {
    memcpy(out, architectures, sizeof architectures);
    return success;
}

NVRTC_API int nvrtcCreateProgram(Program** out, const char* source, const char* name, int count,
                                 const char* const* headers, const char* const* names) {
    if (!out || !source || count < 0) return invalid_input;
    auto program = new Program;
    program->name = name && *name ? fs::path(name).filename().string() : "default_program";
    program->source = source;
    for (int i = 0; i < count; ++i) program->headers.push_back({names[i], headers[i]});
    *out = program;
    return success;
}

NVRTC_API int nvrtcDestroyProgram(Program** program) {
    if (!program || !*program) return invalid_program;
    delete *program;
    *program = nullptr;
    return success;
}

NVRTC_API int nvrtcCompileProgram(Program* program, int count, const char* const* options) {
    if (!program) return invalid_program;
    program->log.clear();
    program->image.clear();
    return compile(*program, read_options(count, options));
}

NVRTC_API int nvrtcGetProgramLogSize(Program* program, size_t* size) {
    if (!program) return invalid_program;
    *size = program->log.size() + 1;
    return success;
}

NVRTC_API int nvrtcGetProgramLog(Program* program, char* log) {
    if (!program) return invalid_program;
    memcpy(log, program->log.c_str(), program->log.size() + 1);
    return success;
}

NVRTC_API int nvrtcGetCUBINSize(Program* program, size_t* size) { return image_size(program, size); }

NVRTC_API int nvrtcGetCUBIN(Program* program, char* image) { return copy_image(program, image); }

// There is no text form: the image stands for both.
NVRTC_API int nvrtcGetPTXSize(Program* program, size_t* size) { return image_size(program, size); }

NVRTC_API int nvrtcGetPTX(Program* program, char* image) { return copy_image(program, image); }
