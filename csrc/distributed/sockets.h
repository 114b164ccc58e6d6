// Addresses of this host, for ranks that meet over TCP.
#pragma once

#include <string>

namespace mixtral {

struct Listener {
  int descriptor;
  int port;
};

// Listens at `address` alone: nobody else can connect. Port 0: any free one. Throws std::system_error, or
// std::runtime_error where the address is not known.
Listener listen_at(const std::string& address, int port);

// Whether somebody listens there, now or within so many seconds.
bool answers(const std::string& address, int port, double seconds);

// This host's own address on the way to another one, such as "10.0.0.2".
std::string own_address_towards(const std::string& address, int port);

}  // namespace mixtral
