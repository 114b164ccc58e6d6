#include <gtest/gtest.h>

#include <stdexcept>

#include "model/page_pool.h"

namespace mixtral {
namespace {

using Ids = std::vector<int64_t>;

TEST(PagePool, TakesPagesWithoutANameFirstAndThenTheLeastRecentlyUsed) {
  PagePool pool(4, 2);
  const Ids ids = {1, 2, 3, 4};
  PagePool::Prefix* prefix = pool.begin(0);
  const int32_t a = pool.take(), b = pool.take(), c = pool.take();
  EXPECT_EQ((Ids{a, b, c}), (Ids{0, 1, 2}));
  for (const int32_t page : {a, b}) {
    prefix = pool.extend(prefix, ids.data() + 2 * page);
    pool.name(page, prefix);
  }
  for (const int32_t page : {b, c, a}) pool.release(page);
  EXPECT_EQ(pool.available(), 4);
  EXPECT_EQ(pool.cached(), 2);
  pool.check_integrity({0, 0, 0, 0}, {prefix});
  EXPECT_EQ(pool.take(), c);  // no name, and in memory already
  EXPECT_EQ(pool.take(), 3);
  pool.share(b);  // used again: now `a` is the least recently used
  pool.release(b);
  EXPECT_EQ(pool.take(), a);
  EXPECT_EQ(pool.cached(), 1);
  EXPECT_EQ(pool.take(), b);
  EXPECT_EQ(pool.cached(), 0);
  EXPECT_EQ(prefix->page, -1);
  pool.check_integrity({1, 1, 1, 1}, {prefix});
}

TEST(PagePool, PrefixesAreEqualWhenAllTheirTokensAre) {
  PagePool pool(4, 2);
  const Ids first = {1, 2}, second = {3, 4}, other = {5, 6};
  const auto extend = [&](int64_t kind, const Ids& a, const Ids& b) {
    return pool.extend(pool.extend(pool.begin(kind), a.data()), b.data());
  };
  PagePool::Prefix* const prefix = extend(0, first, second);
  EXPECT_EQ(extend(0, first, second), prefix);
  EXPECT_NE(extend(0, other, second), prefix);  // the last page alone is not enough
  EXPECT_NE(extend(1, first, second), prefix);  // nor are the tokens alone
  PagePool::Prefix* const begin = pool.begin(0);
  EXPECT_EQ(pool.find(pool.find(begin, first.data()), second.data()), prefix);
  EXPECT_EQ(pool.find(begin, second.data()), nullptr);
}

TEST(PagePool, APrefixLivesAsLongAsSomethingNeedsIt) {
  PagePool pool(1, 2);
  const Ids ids = {1, 2, 3, 4, 5, 6};
  PagePool::Prefix* prefix = pool.begin(0);
  for (int i = 0; i < 3; ++i) prefix = pool.extend(prefix, ids.data() + 2 * i);
  const int32_t page = pool.take();
  pool.name(page, prefix);
  pool.drop(prefix);  // the page needs it, and it needs the two before
  pool.release(page);
  pool.check_integrity({0}, {});
  PagePool::Prefix* const begin = pool.begin(0);
  PagePool::Prefix* found = begin;
  for (int i = 0; i < 3; ++i) ASSERT_TRUE(found = pool.find(found, ids.data() + 2 * i));
  EXPECT_EQ(found->page, page);
  EXPECT_EQ(pool.take(), page);  // loses its name, and with it all three go
  EXPECT_EQ(pool.find(begin, ids.data()), nullptr);
  pool.check_integrity({1}, {begin});
}

TEST(PagePool, CheckIntegrityFindsWhatIsLost) {
  PagePool pool(2, 2);
  const int32_t page = pool.take();
  PagePool::Prefix* const prefix = pool.begin(0);
  pool.check_integrity({1, 0}, {prefix});
  EXPECT_THROW(pool.check_integrity({0, 0}, {prefix}), std::logic_error);          // a page that nobody holds
  EXPECT_THROW(pool.check_integrity({2, 0}, {prefix}), std::logic_error);          // one held twice, counted once
  EXPECT_THROW(pool.check_integrity({1, 0}, {}), std::logic_error);                // a prefix that nobody holds
  EXPECT_THROW(pool.check_integrity({1, 0}, {prefix, prefix}), std::logic_error);  // one held twice, counted once
  pool.release(page);
}

}  // namespace
}  // namespace mixtral
