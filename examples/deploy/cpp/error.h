// The one kind of error this program reports: a line that says what is wrong and what to do.
#pragma once

#include <stdexcept>
#include <string>

struct UserError : std::runtime_error {
  using std::runtime_error::runtime_error;
};
