#include "sockets.h"

#include <netdb.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <memory>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <utility>

namespace mixtral {
namespace {

using Addresses = std::unique_ptr<addrinfo, void (*)(addrinfo*)>;

Addresses look_up(const std::string& address, int port, int type) {
  addrinfo hints = {};
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = type;
  addrinfo* found = nullptr;
  const int error = getaddrinfo(address.c_str(), std::to_string(port).c_str(), &hints, &found);
  if (error != 0) throw std::runtime_error("cannot find the address " + address + ": " + gai_strerror(error));
  return {found, freeaddrinfo};
}

struct Socket {
  explicit Socket(const addrinfo& of, int flags = 0)
      : descriptor(::socket(of.ai_family, of.ai_socktype | SOCK_CLOEXEC | flags, 0)) {}
  ~Socket() {
    if (descriptor >= 0) ::close(descriptor);
  }
  int release() { return std::exchange(descriptor, -1); }
  int descriptor;
};

[[noreturn]] void throw_error(const std::string& what) {
  throw std::system_error(errno, std::generic_category(), what);
}

}  // namespace

Listener listen_at(const std::string& address, int port) {
  const Addresses addresses = look_up(address, port, SOCK_STREAM);
  Socket socket(*addresses);
  const int on = 1;
  setsockopt(socket.descriptor, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
  if (bind(socket.descriptor, addresses->ai_addr, addresses->ai_addrlen) != 0 || listen(socket.descriptor, 128) != 0)
    throw_error("cannot listen at " + address + ":" + std::to_string(port));
  sockaddr_storage own = {};
  socklen_t size = sizeof own;
  if (getsockname(socket.descriptor, reinterpret_cast<sockaddr*>(&own), &size) != 0)
    throw_error("cannot find the own port");
  const auto bound = own.ss_family == AF_INET6 ? reinterpret_cast<sockaddr_in6*>(&own)->sin6_port
                                               : reinterpret_cast<sockaddr_in*>(&own)->sin_port;
  return {socket.release(), ntohs(bound)};
}

bool answers(const std::string& address, int port, double seconds) {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  const Addresses addresses = look_up(address, port, SOCK_STREAM);
  for (;;) {
    const Socket socket(*addresses, SOCK_NONBLOCK);
    connect(socket.descriptor, addresses->ai_addr, addresses->ai_addrlen);
    pollfd connected = {socket.descriptor, POLLOUT, 0};
    int error = 0;
    socklen_t size = sizeof error;
    if (poll(&connected, 1, /*milliseconds=*/1000) == 1 &&
        getsockopt(socket.descriptor, SOL_SOCKET, SO_ERROR, &error, &size) == 0 && error == 0)
      return true;
    if (std::chrono::steady_clock::now() > deadline) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
  }
}

std::string own_address_towards(const std::string& address, int port) {
  const Addresses addresses = look_up(address, port, SOCK_DGRAM);
  const Socket socket(*addresses);
  sockaddr_storage own = {};
  socklen_t size = sizeof own;
  char text[NI_MAXHOST];
  // Connecting a datagram socket sends nothing: it chooses the way.
  if (connect(socket.descriptor, addresses->ai_addr, addresses->ai_addrlen) != 0 ||
      getsockname(socket.descriptor, reinterpret_cast<sockaddr*>(&own), &size) != 0 ||
      getnameinfo(reinterpret_cast<sockaddr*>(&own), size, text, sizeof text, nullptr, 0, NI_NUMERICHOST) != 0)
    throw_error("there is no way to " + address);
  return text;
}

}  // namespace mixtral
