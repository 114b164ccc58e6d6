// Which memory large pages are asked for.
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <functional>
#include <mutex>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "io/new_pages.h"

namespace mixtral {
namespace {

constexpr uint64_t kLargePage = 2 << 20, kGiB = 1 << 30;
constexpr double kFast = 0.2e-3, kSlow = 8e-3;  // seconds

// Memory of at least so many bytes from its first large page on.
class Reserved {
 public:
  explicit Reserved(uint64_t bytes) : bytes_(bytes + kLargePage) {
    data_ = ::mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (data_ == MAP_FAILED) throw std::bad_alloc();
  }
  ~Reserved() { ::munmap(data_, bytes_); }
  Reserved(const Reserved&) = delete;

  char* large_page() const {
    return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(data_) + kLargePage - 1) / kLargePage * kLargePage);
  }

 private:
  void* data_;
  uint64_t bytes_;
};

// Whether the mapping of `address` has large pages asked for ("hg" in /proc/self/smaps).
bool asked_for(const char* address) {
  std::ifstream file("/proc/self/smaps");
  bool here = false;
  for (std::string line; std::getline(file, line);) {
    unsigned long begin, end;
    if (std::sscanf(line.c_str(), "%lx-%lx ", &begin, &end) == 2)
      here = begin <= reinterpret_cast<uintptr_t>(address) && reinterpret_cast<uintptr_t>(address) < end;
    if (here && line.rfind("VmFlags:", 0) == 0) return line.find(" hg") != std::string::npos;
  }
  return false;
}

bool system_has_large_pages() { return std::ifstream("/sys/kernel/mm/transparent_hugepage/enabled").good(); }

void here(const std::function<void()>& body) { body(); }

TEST(LargePages, WholeOnesAreBroughtOnceEach) {
  const Reserved memory(64 * kLargePage);
  std::mutex mutex;
  std::vector<char*> brought;
  LargePages large_pages([&](const PageRange& page) {
    EXPECT_EQ(page.bytes, kLargePage);
    const std::lock_guard<std::mutex> lock(mutex);
    brought.push_back(page.begin);
    return kFast;
  });
  const auto on_four_threads = [](const std::function<void()>& body) {
    std::vector<std::thread> threads;
    for (int i = 0; i < 4; ++i) threads.emplace_back(body);
    for (std::thread& thread : threads) thread.join();
  };
  large_pages.bring({memory.large_page() + 4096, 62 * kLargePage}, on_four_threads);
  std::sort(brought.begin(), brought.end());
  ASSERT_EQ(brought.size(), 61u);
  for (size_t i = 0; i < brought.size(); ++i) EXPECT_EQ(brought[i], memory.large_page() + (i + 1) * kLargePage);
  large_pages.bring({memory.large_page() + 4096, 2 * kLargePage - 8192}, here);  // holds none
  large_pages.bring({memory.large_page(), 4096}, here);
  large_pages.bring({memory.large_page(), 0}, here);
  EXPECT_EQ(brought.size(), 61u);
}

TEST(LargePages, TheSystemIsAskedForThemUntilOneTakesLong) {
  if (!system_has_large_pages()) GTEST_SKIP() << "the system has no transparent huge pages";
  const Reserved memory(8 * kLargePage);
  char* const begin = memory.large_page();
  int pages = 0;
  LargePages large_pages([&](const PageRange& page) {
    EXPECT_TRUE(asked_for(page.begin));
    return ++pages == 3 ? kSlow : kFast;
  });
  large_pages.bring({begin, 6 * kLargePage}, here);
  EXPECT_EQ(pages, 3);
  EXPECT_TRUE(asked_for(begin + 2 * kLargePage));
  EXPECT_FALSE(asked_for(begin + 3 * kLargePage));
  EXPECT_FALSE(asked_for(begin + 5 * kLargePage));
}

TEST(LargePages, AfterASlowOneTheNextGiBGetsSmallPages) {
  const Reserved memory(2 * kLargePage);
  int pages = 0;
  double seconds = kSlow;
  LargePages large_pages([&](const PageRange&) {
    ++pages;
    return seconds;
  });
  const PageRange range{memory.large_page(), 2 * kLargePage};
  large_pages.bring(range, here);
  EXPECT_EQ(pages, 1);
  seconds = kFast;
  for (uint64_t bytes = 0; bytes < kGiB; bytes += range.bytes) large_pages.bring(range, here);
  EXPECT_EQ(pages, 1);
  EXPECT_FALSE(asked_for(range.begin));
  large_pages.bring(range, here);
  EXPECT_EQ(pages, 3);
  EXPECT_EQ(asked_for(range.begin), system_has_large_pages());
}

TEST(NewPages, AreThereAndKeepWhatWasWritten) {
  const Reserved memory(4 * kLargePage);
  const PageRange range{memory.large_page(), kLargePage};
  std::memset(range.begin, 7, 4096);
  bring_into_being(range);
  EXPECT_EQ(range.begin[4095], 7);
  EXPECT_EQ(range.begin[4096], 0);
  std::vector<unsigned char> resident(kLargePage / 4096);
  ASSERT_EQ(::mincore(range.begin, range.bytes, resident.data()), 0);
  if (::madvise(range.begin, range.bytes, 23 /* MADV_POPULATE_WRITE */) != 0) GTEST_SKIP() << "needs Linux 5.14";
  EXPECT_TRUE(std::all_of(resident.begin(), resident.end(), [](unsigned char page) { return (page & 1) != 0; }));
}

}  // namespace
}  // namespace mixtral
