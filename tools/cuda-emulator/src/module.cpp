// Programs: shared objects made by the emulated NVRTC, loaded from memory.

#include <dlfcn.h>
#include <elf.h>
#include <link.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <set>

#include "driver.h"

namespace emulator {

namespace {

std::set<Module*> modules;
std::set<Function*> functions;

constexpr char kernels_symbol[] = "emulator_kernels";
constexpr char dynamic_shared_symbol[] = "emulator_dynamic_shared";

enum FunctionAttribute : int {
    max_threads_attribute = 0,
    shared_size_attribute = 1,
    constant_size_attribute = 2,
    local_size_attribute = 3,
    registers_attribute = 4,
    ptx_version_attribute = 5,
    binary_version_attribute = 6,
    max_dynamic_shared_attribute = 8,
    shared_carveout_attribute = 9,
};

// What a kernel is assumed to take: the emulator does not allocate registers.
constexpr int registers_per_thread = 64;

// Size of an ELF image for this processor; its section headers end it. 0 for anything else.
size_t image_size(const void* image) {
    Elf64_Ehdr header;
    memcpy(&header, image, sizeof header);
    if (memcmp(header.e_ident, ELFMAG, SELFMAG) != 0 || header.e_machine != EM_X86_64) return 0;
    return header.e_shoff + (size_t)header.e_shnum * header.e_shentsize;
}

bool starts_with(const char* text, const char* prefix) {
    return strncmp(text, prefix, strlen(prefix)) == 0;
}

void sort_symbol(Module& module, const Elf64_Sym& symbol, const char* name, const char* section) {
    bool zeroed = starts_with(section, ".bss");
    bool data = starts_with(section, ".data") && !starts_with(section, ".data.rel.ro");
    if (starts_with(name, "_ZZ")) {
        if (zeroed) module.shared.push_back({name, symbol.st_value, symbol.st_size});
    } else if (zeroed || data) {
        module.variables.push_back({name, symbol.st_value, symbol.st_size});
    }
}

void read_symbols(Module& module) {
    const char* image = module.image.data();
    auto header = (const Elf64_Ehdr*)image;
    auto sections = (const Elf64_Shdr*)(image + header->e_shoff);
    const char* section_names = image + sections[header->e_shstrndx].sh_offset;
    for (unsigned i = 0; i < header->e_shnum; ++i) {
        if (sections[i].sh_type != SHT_SYMTAB) continue;
        auto symbols = (const Elf64_Sym*)(image + sections[i].sh_offset);
        const char* names = image + sections[sections[i].sh_link].sh_offset;
        for (size_t s = 0; s < sections[i].sh_size / sizeof *symbols; ++s) {
            const Elf64_Sym& symbol = symbols[s];
            if (ELF64_ST_TYPE(symbol.st_info) != STT_OBJECT) continue;
            if (symbol.st_shndx == SHN_UNDEF || symbol.st_shndx >= header->e_shnum) continue;
            sort_symbol(module, symbol, names + symbol.st_name,
                        section_names + sections[symbol.st_shndx].sh_name);
        }
    }
}

size_t loaded_size(const std::vector<char>& image) {
    auto header = (const Elf64_Ehdr*)image.data();
    auto segments = (const Elf64_Phdr*)(image.data() + header->e_phoff);
    size_t end = 0;
    for (unsigned i = 0; i < header->e_phnum; ++i) {
        if (segments[i].p_type != PT_LOAD) continue;
        end = std::max<size_t>(end, segments[i].p_vaddr + segments[i].p_memsz);
    }
    return end;
}

// Makes the functions that kernels call visible to them.
void export_runtime() {
    Dl_info info;
    if (dladdr((const void*)&emulator_yield, &info)) {
        dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD | RTLD_GLOBAL);
    }
}

// The file stays open: its number is part of the name by which the loader tells programs apart.
bool load_copy(Module& module) {
    static std::once_flag once;
    std::call_once(once, export_runtime);
    int file = memfd_create("cuda-program", MFD_CLOEXEC);
    if (file < 0) return false;
    const std::vector<char>& image = module.image;
    for (size_t done = 0; done < image.size();) {
        ssize_t count = write(file, image.data() + done, image.size() - done);
        if (count <= 0) {
            close(file);
            return false;
        }
        done += (size_t)count;
    }
    std::string path = "/proc/self/fd/" + std::to_string(file);
    void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!handle) {
        refuse(CUDA_ERROR_INVALID_IMAGE, dlerror());
        close(file);
        return false;
    }
    link_map* map = nullptr;
    dlinfo(handle, RTLD_DI_LINKMAP, &map);
    module.copies.push_back({handle, file, (char*)map->l_addr, loaded_size(image)});
    return true;
}

const Kernel* kernels_of(const Module::Copy& copy) {
    return (const Kernel*)dlsym(copy.handle, kernels_symbol);
}

// Mangled names of a kernel's own variables begin with this.
std::string variable_prefix(const char* kernel) {
    return "_ZZ" + std::to_string(strlen(kernel)) + kernel + "E";
}

void add_functions(Module& module, const Kernel* kernels) {
    std::vector<std::string> prefixes;
    for (size_t i = 0; kernels[i].name; ++i) prefixes.push_back(variable_prefix(kernels[i].name));
    for (size_t i = 0; kernels[i].name; ++i) {
        auto function = std::make_unique<Function>();
        function->module = &module;
        function->kernel = &kernels[i];
        function->index = i;
        function->static_shared = 0;
        for (const Symbol& symbol : module.shared) {
            bool own = symbol.name.starts_with(prefixes[i]);
            bool other_kernel = std::any_of(prefixes.begin(), prefixes.end(), [&](auto& prefix) {
                return symbol.name.starts_with(prefix);
            });
            if (own) function->static_shared += symbol.size;
            if (own || !other_kernel) function->shared.push_back(symbol);
        }
        function->dynamic_shared_limit =
            default_shared_limit - std::min<size_t>(default_shared_limit, function->static_shared);
        functions.insert(function.get());
        module.functions.push_back(std::move(function));
    }
}

void unload(Module& module) {
    for (auto& function : module.functions) functions.erase(function.get());
    for (const Module::Copy& copy : module.copies) {
        dlclose(copy.handle);
        close(copy.file);
    }
}

CUresult load(void** out, const void* image) {
    if (!out || !image) return CUDA_ERROR_INVALID_VALUE;
    size_t size = image_size(image);
    if (size == 0) {
        return refuse(CUDA_ERROR_NO_BINARY_FOR_GPU,
                      "the program was not compiled by the emulated NVRTC");
    }
    auto module = std::make_unique<Module>();
    module->image.assign((const char*)image, (const char*)image + size);
    if (!load_copy(*module)) return CUDA_ERROR_INVALID_IMAGE;
    const Kernel* kernels = kernels_of(module->copies[0]);
    if (!kernels) {
        unload(*module);
        return CUDA_ERROR_INVALID_IMAGE;
    }
    read_symbols(*module);
    add_functions(*module, kernels);
    for (auto& function : module->functions) {
        if (function->static_shared <= default_shared_limit) continue;
        refuse(CUDA_ERROR_INVALID_IMAGE, std::string(function->kernel->name) + " has " +
                                             std::to_string(function->static_shared) +
                                             " bytes of static shared memory, at most 49152");
        unload(*module);
        return CUDA_ERROR_INVALID_IMAGE;
    }
    *out = *modules.insert(module.release()).first;
    return CUDA_SUCCESS;
}

template <class Body>
CUresult with_function(void* handle, Body body) {
    return in_context([&] {
        Function* function = find_function(handle);
        return function ? body(*function) : refuse(CUDA_ERROR_INVALID_HANDLE, "no such function");
    });
}

int active_blocks(const Function& function, int threads, size_t dynamic_shared) {
    constexpr int threads_per_multiprocessor = 2048, blocks_per_multiprocessor = 32;
    constexpr int registers = 65536;
    constexpr size_t shared = 228 << 10, reserved = 1 << 10;
    int rounded = (threads + 31) / 32 * 32;
    size_t shared_of_block = dynamic_shared + function.static_shared + reserved;
    return std::min({blocks_per_multiprocessor, threads_per_multiprocessor / rounded,
                     registers / (registers_per_thread * rounded), (int)(shared / shared_of_block)});
}

}  // namespace

const ProgramCopy* program_for(Function& function, size_t worker) {
    Module& module = *function.module;
    while (module.copies.size() <= worker) {
        if (!load_copy(module)) return nullptr;
    }
    if (function.programs.size() <= worker) function.programs.resize(worker + 1);
    auto& program = function.programs[worker];
    if (!program) {
        const Module::Copy& copy = module.copies[worker];
        program = std::make_unique<ProgramCopy>();
        program->run = kernels_of(copy)[function.index].run;
        program->dynamic_shared = (char*)dlsym(copy.handle, dynamic_shared_symbol);
        program->image_low = copy.base;
        program->image_high = copy.base + copy.size;
        for (const Symbol& symbol : function.shared) {
            program->static_shared.push_back({copy.base + symbol.offset, symbol.size});
        }
    }
    return program.get();
}

Function* find_function(void* handle) {
    auto found = functions.find((Function*)handle);
    return found == functions.end() ? nullptr : *found;
}

bool in_module(CUdeviceptr p, size_t bytes) {
    for (const Module* module : modules) {
        const Module::Copy& copy = module->copies[0];
        auto base = (CUdeviceptr)copy.base;
        if (p >= base && p - base <= copy.size && bytes <= copy.size - (p - base)) return true;
    }
    return false;
}

}  // namespace emulator

using namespace emulator;

EMULATOR_API cuModuleLoadData(void** module, const void* image) {
    return in_context([&] { return load(module, image); });
}

EMULATOR_API cuModuleLoadDataEx(void** module, const void* image, unsigned, int*, void**) {
    return in_context([&] { return load(module, image); });
}

EMULATOR_API cuModuleUnload(void* handle) {
    return in_context([&] {
        auto found = modules.find((Module*)handle);
        if (found == modules.end()) return refuse(CUDA_ERROR_INVALID_HANDLE, "no such module");
        std::unique_ptr<Module> module(*found);
        modules.erase(found);
        unload(*module);
        return CUDA_SUCCESS;
    });
}

EMULATOR_API cuModuleGetFunction(void** out, void* handle, const char* name) {
    return in_context([&] {
        auto found = modules.find((Module*)handle);
        if (found == modules.end()) return refuse(CUDA_ERROR_INVALID_HANDLE, "no such module");
        for (auto& function : (*found)->functions) {
            if (strcmp(function->kernel->name, name) != 0) continue;
            *out = function.get();
            return CUDA_SUCCESS;
        }
        return CUDA_ERROR_NOT_FOUND;
    });
}

EMULATOR_API cuModuleGetGlobal_v2(CUdeviceptr* p, size_t* size, void* handle, const char* name) {
    return in_context([&] {
        auto found = modules.find((Module*)handle);
        if (found == modules.end()) return refuse(CUDA_ERROR_INVALID_HANDLE, "no such module");
        for (const Symbol& symbol : (*found)->variables) {
            if (symbol.name != name) continue;
            if (p) *p = (CUdeviceptr)((*found)->copies[0].base + symbol.offset);
            if (size) *size = symbol.size;
            return CUDA_SUCCESS;
        }
        return CUDA_ERROR_NOT_FOUND;
    });
}

EMULATOR_API cuFuncGetAttribute(int* value, int attribute, void* handle) {
    return with_function(handle, [&](Function& function) {
        switch (attribute) {
            case max_threads_attribute: *value = (int)function.kernel->max_threads; break;
            case shared_size_attribute: *value = (int)function.static_shared; break;
            case registers_attribute: *value = registers_per_thread; break;
            case ptx_version_attribute:
            case binary_version_attribute: *value = 90; break;
            case max_dynamic_shared_attribute: *value = (int)function.dynamic_shared_limit; break;
            case shared_carveout_attribute: *value = -1; break;
            case constant_size_attribute:
            case local_size_attribute: *value = 0; break;
            default: return CUDA_ERROR_INVALID_VALUE;
        }
        return CUDA_SUCCESS;
    });
}

EMULATOR_API cuFuncSetAttribute(void* handle, int attribute, int value) {
    return with_function(handle, [&](Function& function) {
        if (attribute == shared_carveout_attribute) return CUDA_SUCCESS;
        if (attribute != max_dynamic_shared_attribute || value < 0 ||
            (size_t)value + function.static_shared > max_dynamic_shared) {
            return refuse(CUDA_ERROR_INVALID_VALUE,
                          "attribute " + std::to_string(attribute) + " of " +
                              function.kernel->name + " cannot be " + std::to_string(value));
        }
        function.dynamic_shared_limit = (size_t)value;
        return CUDA_SUCCESS;
    });
}

EMULATOR_API cuFuncGetParamInfo(void* handle, size_t index, size_t* offset, size_t* size) {
    return with_function(handle, [&](Function& function) {
        const Kernel& kernel = *function.kernel;
        if (!offset || index >= kernel.parameter_count) return CUDA_ERROR_INVALID_VALUE;
        size_t end = 0;
        for (size_t i = 0; i <= index; ++i) {
            size_t alignment = kernel.parameter_alignments[i];
            *offset = (end + alignment - 1) / alignment * alignment;
            end = *offset + kernel.parameter_sizes[i];
        }
        if (size) *size = kernel.parameter_sizes[index];
        return CUDA_SUCCESS;
    });
}

EMULATOR_API cuFuncSetCacheConfig(void* handle, int) {
    return with_function(handle, [](Function&) { return CUDA_SUCCESS; });
}

EMULATOR_API cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void* handle, int threads,
                                                         size_t dynamic_shared) {
    return with_function(handle, [&](Function& function) {
        if (threads <= 0) return CUDA_ERROR_INVALID_VALUE;
        *blocks = active_blocks(function, threads, dynamic_shared);
        return CUDA_SUCCESS;
    });
}
