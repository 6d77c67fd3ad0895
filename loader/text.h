// Text from files, made safe for one line of a message.
#pragma once

#include <string>
#include <string_view>

namespace chimera {

// `text` with every byte outside printable ASCII as \xNN, and cut with "..." after `limit` bytes.
std::string printable(std::string_view text, size_t limit = 80);

// printable() between single quotes.
std::string quoted(std::string_view text);

}  // namespace chimera
