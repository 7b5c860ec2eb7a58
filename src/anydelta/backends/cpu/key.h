// A key of plans: what a plan depends on in the arrays of a call and in the environment, as a row of words. Equal keys
// mean that the same plan serves. Each part says in its first word how long it is.
#pragma once
#include <cstdint>
#include <cstring>
#include <vector>

namespace anydelta {

class Key {
  public:
    void clear() { words_.clear(); }
    void push(uint64_t word) { words_.push_back(word); }
    void push(const void* data, size_t bytes) {
        const size_t before = words_.size(), words = (bytes + 7) / 8;
        words_.resize(before + words);  // the last word ends in zeros
        if (bytes) std::memcpy(words_.data() + before, data, bytes);
    }
    void text(const char* text, size_t bytes) {
        push(bytes);
        push(text, bytes);
    }
    const std::vector<uint64_t>& words() const { return words_; }
    uint64_t hash() const {
        uint64_t h = words_.size();
        for (uint64_t w : words_) h = (h ^ w) * 0x9e3779b97f4a7c15, h ^= h >> 29;
        return h;
    }
    bool operator==(const Key& other) const { return words_ == other.words_; }

  private:
    std::vector<uint64_t> words_;
};

}  // namespace anydelta
