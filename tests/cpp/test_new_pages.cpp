// Which memory large pages are asked for.
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <fstream>
#include <string>
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

TEST(LargePages, TheFirstWholeOneOfTheMemoryIsTimed) {
  const Reserved memory(8 * kLargePage);
  std::vector<PageRange> timed;
  LargePages large_pages([&](const PageRange& page) {
    timed.push_back(page);
    return kFast;
  });
  char* const page = memory.large_page();
  EXPECT_TRUE(large_pages.ask_for({page, kLargePage}));
  EXPECT_TRUE(large_pages.ask_for({page + 4096, 2 * kLargePage}));
  EXPECT_FALSE(large_pages.ask_for({page + 4096, 2 * kLargePage - 8192}));  // holds none
  EXPECT_FALSE(large_pages.ask_for({page, 4096}));
  EXPECT_FALSE(large_pages.ask_for({page, 0}));
  ASSERT_EQ(timed.size(), 2u);
  EXPECT_EQ(timed[0].begin, page);
  EXPECT_EQ(timed[1].begin, page + kLargePage);
  for (const PageRange& range : timed) EXPECT_EQ(range.bytes, kLargePage);
}

TEST(LargePages, TheSystemIsAskedWhereTheFirstOneCameFast) {
  if (!system_has_large_pages()) GTEST_SKIP() << "the system has no transparent huge pages";
  const Reserved fast(4 * kLargePage), slow(4 * kLargePage);
  LargePages([](const PageRange&) { return kFast; }).ask_for({fast.large_page(), 4 * kLargePage});
  EXPECT_TRUE(asked_for(fast.large_page() + 3 * kLargePage));
  bool before = false;  // timing
  LargePages([&](const PageRange& page) {
    before = asked_for(page.begin);
    return kSlow;
  }).ask_for({slow.large_page(), 4 * kLargePage});
  EXPECT_TRUE(before);
  EXPECT_FALSE(asked_for(slow.large_page() + kLargePage));
}

TEST(LargePages, AfterASlowOneTheNextGiBGetsSmallPages) {
  const Reserved memory(kLargePage);
  int timed = 0;
  double seconds = kSlow;
  LargePages large_pages([&](const PageRange&) {
    ++timed;
    return seconds;
  });
  const PageRange range{memory.large_page(), kLargePage};
  EXPECT_FALSE(large_pages.ask_for(range));
  for (uint64_t bytes = 0; bytes < kGiB; bytes += kLargePage) EXPECT_FALSE(large_pages.ask_for(range));
  EXPECT_EQ(timed, 1);
  seconds = kFast;
  EXPECT_TRUE(large_pages.ask_for(range));
  EXPECT_TRUE(large_pages.ask_for(range));
  EXPECT_EQ(timed, 3);
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
