// The events of many requests in one box, and when its reader is woken.
#include <gtest/gtest.h>
#include <poll.h>

#include <map>
#include <thread>

#include "bindings/event_box.h"
#include "generations.h"

namespace mixtral {
namespace {

bool is_readable(const EventBox& box, int milliseconds = 0) {
  pollfd reader = {box.fd(), POLLIN, 0};
  return ::poll(&reader, 1, milliseconds) == 1;
}

// Tells a request's callbacks of new tokens.
struct Teller {
  Teller(EventBox& box, int64_t key) : callbacks(box.callbacks(key)) {}
  void tell(const std::string& text, const std::vector<int64_t>& ids) {
    const size_t first = generation.token_ids.size();
    generation.token_ids.insert(generation.token_ids.end(), ids.begin(), ids.end());
    callbacks.on_progress({text, generation, first});
  }
  Callbacks callbacks;
  Generation generation;
};

TEST(EventBox, MergesWhatTheReaderLeaves) {
  const auto box = std::make_shared<EventBox>();
  Teller one(*box, 1), two(*box, 2);
  one.tell("a", {10});
  two.tell("b", {20});
  one.tell("c", {11, 12});
  one.callbacks.on_end({});
  const auto events = box->take();
  ASSERT_EQ(events.size(), 2u);
  EXPECT_EQ(events[0].key, 1);
  EXPECT_EQ(events[0].text, "ac");
  EXPECT_EQ(events[0].token_ids, (std::vector<int64_t>{10, 11, 12}));
  EXPECT_TRUE(events[0].outcome);
  EXPECT_EQ(events[1].key, 2);
  EXPECT_EQ(events[1].text, "b");
  EXPECT_FALSE(events[1].outcome);

  two.tell("d", {21});
  const auto later = box->take();
  ASSERT_EQ(later.size(), 1u);
  EXPECT_EQ(later[0].token_ids, std::vector<int64_t>{21});
}

TEST(EventBox, WakesItsReaderOnceForAllOfAPass) {
  const auto box = std::make_shared<EventBox>();
  Teller one(*box, 1);
  box->wake();
  EXPECT_FALSE(is_readable(*box));  // there is nothing
  one.tell("", {});
  box->wake();
  EXPECT_FALSE(is_readable(*box));  // more of a prompt was read
  one.tell("a", {1});
  EXPECT_FALSE(is_readable(*box));  // the pass goes on
  box->wake();
  EXPECT_TRUE(is_readable(*box));
  box->take();
  EXPECT_FALSE(is_readable(*box));
  box->wake();
  EXPECT_FALSE(is_readable(*box));
  one.tell("b", {2});
  box->wake();
  EXPECT_TRUE(is_readable(*box));
}

TEST(EventBox, GivesAllThatTheEngineGenerates) {
  const auto model = tiny_model(tiny_config());
  Engine engine(model, std::nullopt, {});
  const auto box = std::make_shared<EventBox>();
  engine.after_passes([box] {
    box->wake();
    return true;
  });
  const auto prompts = some_prompts();
  constexpr int64_t kRequests = 3;
  std::map<int64_t, Event> whole;
  for (int64_t key = 0; key < kRequests; ++key) {
    Request request;
    request.prompt_token_ids = prompts[key];
    request.params = params(9, 1.0, static_cast<uint64_t>(key));
    request.trace = true;
    engine.submit(std::move(request), box->callbacks(key));
  }
  for (int64_t ended = 0; ended < kRequests;) {
    ASSERT_TRUE(is_readable(*box, 60'000));
    for (Event& event : box->take()) {
      Event& all = whole[event.key];
      all.token_ids.insert(all.token_ids.end(), event.token_ids.begin(), event.token_ids.end());
      all.logprobs.insert(all.logprobs.end(), event.logprobs.begin(), event.logprobs.end());
      all.routed_ids.insert(all.routed_ids.end(), event.routed_ids.begin(), event.routed_ids.end());
      all.routed_weights.insert(all.routed_weights.end(), event.routed_weights.begin(), event.routed_weights.end());
      if (!event.outcome) continue;
      all.outcome = std::move(event.outcome);
      ++ended;
    }
  }
  for (const auto& [key, event] : whole) {
    const Generation& generation = event.outcome->generation;
    expect_same(generation, alone(model, prompts[key], params(9, 1.0, static_cast<uint64_t>(key))));
    EXPECT_EQ(event.token_ids, generation.token_ids);
    EXPECT_EQ(event.logprobs.size(), 9u);
    EXPECT_EQ(event.routed_ids, generation.trace->routing.topk_ids);
    EXPECT_EQ(event.routed_weights, generation.trace->routing.topk_weights);
    EXPECT_EQ(generation.trace->tokens(), static_cast<int64_t>(prompts[key].size()) + 8);
  }
}

TEST(EventBox, TwoReadersOfOneEngineAreBothWoken) {
  Engine engine(tiny_model(tiny_config()), std::nullopt, {});
  std::vector<std::shared_ptr<EventBox>> boxes = {std::make_shared<EventBox>(), std::make_shared<EventBox>()};
  int calls_of_the_gone = 0;
  engine.after_passes([&] {
    ++calls_of_the_gone;
    return false;
  });
  for (const auto& box : boxes)
    engine.after_passes([box] {
      box->wake();
      return true;
    });
  for (int64_t key = 0; key < 2; ++key) engine.submit({{1, 2}, params(3)}, boxes[key]->callbacks(key));
  for (int64_t key = 0; key < 2; ++key) {
    for (bool ended = false; !ended;) {
      ASSERT_TRUE(is_readable(*boxes[key], 60'000));
      for (const Event& event : boxes[key]->take()) {
        EXPECT_EQ(event.key, key);
        ended = event.outcome != nullptr;
      }
    }
  }
  engine.stop();
  EXPECT_EQ(calls_of_the_gone, 1);
}

// As a server under load: threads that submit and cancel beside the reader, and places that run out.
TEST(EventBox, EveryRequestOfManyThreadsEndsOnce) {
  constexpr int64_t kClients = 4, kRequests = 30;
  Engine::Options options;
  options.max_queue = 10;
  Engine engine(tiny_model(tiny_config()), std::nullopt, options);
  const auto box = std::make_shared<EventBox>();
  engine.after_passes([box] {
    box->wake();
    return true;
  });
  const auto work = [&](int64_t client) {
    for (int64_t key = client; key < kClients * kRequests;) {
      Request request = {{1, 2, key % 101}, params(1 + key % 7)};
      try {
        request.seat = engine.reserve_seats(1)[0];
      } catch (const QueueFull&) {
        std::this_thread::yield();
        continue;
      }
      const int64_t id = engine.submit(std::move(request), box->callbacks(key));
      if (key % 3 == 0) engine.cancel(id);
      key += kClients;
    }
  };
  std::vector<std::thread> clients;
  for (int64_t client = 0; client < kClients; ++client) clients.emplace_back(work, client);
  std::map<int64_t, std::vector<int64_t>> tokens;
  for (int64_t left = kClients * kRequests; left > 0;) {
    ASSERT_TRUE(is_readable(*box, 60'000));
    for (const Event& event : box->take()) {
      auto& ids = tokens[event.key];
      ids.insert(ids.end(), event.token_ids.begin(), event.token_ids.end());
      if (!event.outcome) continue;
      --left;
      EXPECT_EQ(ids, event.outcome->generation.token_ids);
      EXPECT_EQ(event.outcome->generation.finish_reason == "length",
                ids.size() == static_cast<size_t>(1 + event.key % 7));
      ids = {-1};  // a second end would not fit it
    }
  }
  for (std::thread& client : clients) client.join();
  EXPECT_EQ(tokens.size(), static_cast<size_t>(kClients * kRequests));
  EXPECT_EQ(engine.stats().seats_taken, 0);
  engine.check_integrity();
}

TEST(EventBox, ACancelledRequestEndsInTheBox) {
  const auto model = tiny_model(tiny_config());
  Engine engine(model, std::nullopt, {});
  const auto box = std::make_shared<EventBox>();
  engine.after_passes([box] {
    box->wake();
    return true;
  });
  Request request;
  request.prompt_token_ids = {1, 2};
  request.params = params(8000);
  engine.cancel(engine.submit(std::move(request), box->callbacks(7)));
  for (;;) {
    ASSERT_TRUE(is_readable(*box, 60'000));
    const auto events = box->take();
    ASSERT_FALSE(events.empty());
    if (!events.back().outcome) continue;
    EXPECT_EQ(events.back().outcome->generation.finish_reason, "cancelled");
    break;
  }
}

}  // namespace
}  // namespace mixtral
