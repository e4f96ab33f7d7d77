// Which arguments the libraries' ops take: one more with each change of them, here and in rmfast/backends.py. A library
// left by another commit would read what it is given as something else.
#pragma once

#define RMFAST_INTERFACE 5
