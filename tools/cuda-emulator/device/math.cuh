// Floating-point functions. Those with an approximate instruction on a GPU are exact to a
// rounding here.
#pragma once

extern "C" {
float acosf(float) noexcept;
float asinf(float) noexcept;
float atan2f(float, float) noexcept;
float atanf(float) noexcept;
float cbrtf(float) noexcept;
float ceilf(float) noexcept;
float copysignf(float, float) noexcept;
float cosf(float) noexcept;
float coshf(float) noexcept;
float erfcf(float) noexcept;
float erff(float) noexcept;
float exp2f(float) noexcept;
float expf(float) noexcept;
float expm1f(float) noexcept;
float fabsf(float) noexcept;
float fdimf(float, float) noexcept;
float floorf(float) noexcept;
float fmaf(float, float, float) noexcept;
float fmaxf(float, float) noexcept;
float fminf(float, float) noexcept;
float fmodf(float, float) noexcept;
float frexpf(float, int*) noexcept;
float hypotf(float, float) noexcept;
float ldexpf(float, int) noexcept;
float log10f(float) noexcept;
float log1pf(float) noexcept;
float log2f(float) noexcept;
float logf(float) noexcept;
long lrintf(float) noexcept;
float nearbyintf(float) noexcept;
float nextafterf(float, float) noexcept;
float powf(float, float) noexcept;
float rintf(float) noexcept;
float roundf(float) noexcept;
float scalbnf(float, int) noexcept;
float sinf(float) noexcept;
float sinhf(float) noexcept;
float sqrtf(float) noexcept;
float tanf(float) noexcept;
float tanhf(float) noexcept;
float truncf(float) noexcept;
double ceil(double) noexcept;
double cos(double) noexcept;
double exp(double) noexcept;
double exp2(double) noexcept;
double fabs(double) noexcept;
double floor(double) noexcept;
double fma(double, double, double) noexcept;
double fmax(double, double) noexcept;
double fmin(double, double) noexcept;
double fmod(double, double) noexcept;
double log(double) noexcept;
double log1p(double) noexcept;
double log2(double) noexcept;
double pow(double, double) noexcept;
double rint(double) noexcept;
double round(double) noexcept;
double sin(double) noexcept;
double sqrt(double) noexcept;
double tanh(double) noexcept;
double trunc(double) noexcept;
int abs(int) noexcept;
long long llabs(long long) noexcept;
}

#define EMULATOR_FLOAT(name) \
    inline float name(float x) { return name##f(x); }
EMULATOR_FLOAT(ceil)
EMULATOR_FLOAT(cos)
EMULATOR_FLOAT(exp)
EMULATOR_FLOAT(exp2)
EMULATOR_FLOAT(fabs)
EMULATOR_FLOAT(floor)
EMULATOR_FLOAT(log)
EMULATOR_FLOAT(log1p)
EMULATOR_FLOAT(log2)
EMULATOR_FLOAT(rint)
EMULATOR_FLOAT(round)
EMULATOR_FLOAT(sin)
EMULATOR_FLOAT(sqrt)
EMULATOR_FLOAT(tanh)
EMULATOR_FLOAT(trunc)
#undef EMULATOR_FLOAT
inline float pow(float x, float y) { return powf(x, y); }
inline float fmod(float x, float y) { return fmodf(x, y); }
inline float fma(float x, float y, float z) { return fmaf(x, y, z); }
inline float abs(float x) { return fabsf(x); }
inline double abs(double x) { return fabs(x); }
inline long long abs(long long x) { return llabs(x); }

inline bool isnan(float x) { return __builtin_isnan(x); }
inline bool isinf(float x) { return __builtin_isinf(x); }
inline bool isfinite(float x) { return __builtin_isfinite(x); }
inline bool signbit(float x) { return __builtin_signbit(x); }
inline bool isnan(double x) { return __builtin_isnan(x); }
inline bool isinf(double x) { return __builtin_isinf(x); }
inline bool isfinite(double x) { return __builtin_isfinite(x); }

inline float rsqrtf(float x) { return (float)(1.0 / sqrt((double)x)); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline float exp10f(float x) { return (float)pow(10.0, (double)x); }
inline void sincosf(float x, float* s, float* c) { *s = sinf(x), *c = cosf(x); }
inline void sincos(double x, double* s, double* c) { *s = sin(x), *c = cos(x); }
inline float sinpif(float x) { return (float)sin((double)x * 3.14159265358979323846); }
inline float cospif(float x) { return (float)cos((double)x * 3.14159265358979323846); }

inline float __expf(float x) { return expf(x); }
inline float __exp10f(float x) { return exp10f(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __log10f(float x) { return log10f(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline float __tanf(float x) { return tanf(x); }
inline void __sincosf(float x, float* s, float* c) { sincosf(x, s, c); }
inline float __tanhf(float x) { return tanhf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1) : 0; }

// Each rounds by itself: the empty assembly keeps the compiler from fusing it with another.
inline float __fadd_rn(float x, float y) {
    float r = x + y;
    asm("" : "+x"(r));
    return r;
}
inline float __fsub_rn(float x, float y) { return __fadd_rn(x, -y); }
inline float __fmul_rn(float x, float y) {
    float r = x * y;
    asm("" : "+x"(r));
    return r;
}
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __frsqrt_rn(float x) { return rsqrtf(x); }

// As in CUDA, a mix of signed and unsigned compares as unsigned.
#define EMULATOR_MIN_MAX(type, a, b)                            \
    inline type min(a x, b y) { return (type)x < (type)y ? (type)x : (type)y; } \
    inline type max(a x, b y) { return (type)x > (type)y ? (type)x : (type)y; }
EMULATOR_MIN_MAX(int, int, int)
EMULATOR_MIN_MAX(unsigned, unsigned, unsigned)
EMULATOR_MIN_MAX(unsigned, unsigned, int)
EMULATOR_MIN_MAX(unsigned, int, unsigned)
EMULATOR_MIN_MAX(long, long, long)
EMULATOR_MIN_MAX(unsigned long, unsigned long, unsigned long)
EMULATOR_MIN_MAX(unsigned long, unsigned long, long)
EMULATOR_MIN_MAX(unsigned long, long, unsigned long)
EMULATOR_MIN_MAX(long long, long long, long long)
EMULATOR_MIN_MAX(unsigned long long, unsigned long long, unsigned long long)
EMULATOR_MIN_MAX(unsigned long long, unsigned long long, long long)
EMULATOR_MIN_MAX(unsigned long long, long long, unsigned long long)
#undef EMULATOR_MIN_MAX
inline float min(float x, float y) { return fminf(x, y); }
inline float max(float x, float y) { return fmaxf(x, y); }
inline double min(double x, double y) { return fmin(x, y); }
inline double max(double x, double y) { return fmax(x, y); }
inline double min(float x, double y) { return fmin(x, y); }
inline double max(float x, double y) { return fmax(x, y); }
inline double min(double x, float y) { return fmin(x, y); }
inline double max(double x, float y) { return fmax(x, y); }
