/* Included after the kernel's own definition. __init functions are also
 * __cold, which makes gcc optimize them for size: byte-wise `rep stosb`, no
 * inlining. Here boot code is the code that has to be quick. */
#undef __cold
#define __cold
