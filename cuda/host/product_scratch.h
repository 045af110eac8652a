// Memory of a thread that grows and is kept.
#pragma once
#include <cstddef>
#include <cstdlib>
#include <new>

namespace rwkv {

class Scratch {
  void* data_ = nullptr;
  std::size_t size_ = 0;

 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }
  // At least so many of T, aligned to 64 bytes, with any contents; valid until the next call.
  template <class T> T* get(std::size_t count) {
    const std::size_t wanted = (count * sizeof(T) + 63) / 64 * 64;
    if (wanted > size_) {
      std::free(data_);
      size_ = 0;
      data_ = std::aligned_alloc(64, wanted);
      if (!data_) throw std::bad_alloc();
      size_ = wanted;
    }
    return (T*)data_;
  }
};

}  // namespace rwkv
