// What DLPack does not say about a torch tensor (arrays.h): its dispatch keys, the size of its storage, and whether
// autograd tracks it. torch has no C interface for these that serves every release, and asking in Python takes longer
// than the kernel of a small head. So the reader finds the places of these words in tensors for which Python knows
// them (torch_ops.py). If it does not find them, every call takes the path through Python.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

namespace anydelta {

class TensorWords {
  public:
    // A tensor's Python object, and what Python knows about it.
    struct Known {
        uintptr_t object;
        uint64_t impl, keys, storage, data, bytes;
        bool autograd;  // whether autograd tracks it: it requires grad, or is a view
        uint64_t uses, storage_uses;  // how many references C++ holds to it, and to its storage
    };

    // False: this torch keeps the words elsewhere.
    bool learn(const std::vector<Known>& known) {
        const auto same = [](uint64_t w) { return w; };
        const auto search = [&](size_t& place, size_t words, auto base, auto value, auto seen) {
            for (place = 0; place < words; ++place) {
                bool all = !known.empty();
                for (const Known& x : known) all = all && seen(word(base(x), place)) == value(x);
                if (all) return true;
            }
            return false;
        };
        const auto find = [&](size_t& place, size_t words, auto base, auto value) {
            return search(place, words, base, value, same);
        };
        const auto impl = [](const Known& x) { return static_cast<uintptr_t>(x.impl); };
        const auto storage = [](const Known& x) { return static_cast<uintptr_t>(x.storage); };
        // The objects of torch 2.10 to 2.13 have 24, 22 and 8 words.
        const bool found =
            find(
                impl_, 6, [](const Known& x) { return x.object; }, [](const Known& x) { return x.impl; }) &&
            find(keys_, 24, impl, [](const Known& x) { return x.keys; }) &&
            search(
                autograd_, 8, impl, [](const Known& x) { return x.autograd; }, [](uint64_t w) { return w != 0; }) &&
            find(storage_, 8, impl, [](const Known& x) { return x.storage; }) &&
            find(data_, 8, storage, [](const Known& x) { return x.data; }) &&
            find(bytes_, 8, storage, [](const Known& x) { return x.bytes; });
        counted_ = found &&
                   search(
                       uses_, 3, impl, [](const Known& x) { return x.uses; }, count) &&
                   search(storage_uses_, 3, storage, [](const Known& x) { return x.storage_uses; }, count);
        return found;
    }

    uint64_t keys(const void* tensor) const { return word(impl(tensor), keys_); }
    // False: it does not require grad.
    bool autograd(const void* tensor) const { return word(impl(tensor), autograd_) != 0; }

    // Whether C++ holds one reference to the tensor, and only the tensor its storage; false if not known.
    bool alone(const void* tensor) const {
        const uintptr_t at = impl(tensor), storage = word(at, storage_);
        return counted_ && storage && count(word(at, uses_)) == 1 && count(word(storage, storage_uses_)) == 1;
    }
    uintptr_t impl(const void* tensor) const { return word(reinterpret_cast<uintptr_t>(tensor), impl_); }

    // Whether the tensor's storage has this many bytes from this address on.
    bool holds(const void* tensor, uintptr_t address, uint64_t bytes) const {
        const uintptr_t storage = word(impl(tensor), storage_);
        if (!storage) return false;
        const uintptr_t begin = word(storage, data_);
        return begin && address >= begin && address + bytes <= begin + word(storage, bytes_);
    }

  private:
    size_t impl_ = 0, keys_ = 0, autograd_ = 0, storage_ = 0, data_ = 0, bytes_ = 0, uses_ = 0, storage_uses_ = 0;
    bool counted_ = false;

    // Reference counts take half a word; the other half counts weak references.
    static uint64_t count(uint64_t w) { return w & 0xffffffff; }
    static uint64_t word(uintptr_t object, size_t place) {
        uint64_t value;
        std::memcpy(&value, reinterpret_cast<const char*>(object) + 8 * place, sizeof value);
        return value;
    }
};

}  // namespace anydelta
