#pragma once

__device__ const unsigned squares[8] = {0, 1, 4, 9, 16, 25, 36, 49};
