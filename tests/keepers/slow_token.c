/* A PKCS#11 library in front of another one: encryption and decryption wait while the file HOLD_FILE exists. */
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef unsigned long rv;
typedef struct { unsigned char major, minor; void *call[68]; } functions;
typedef rv (*with_data)(unsigned long, void *, unsigned long, void *, void *);

/* Places in CK_FUNCTION_LIST of PKCS#11 2.40. */
enum { ENCRYPT = 30, DECRYPT = 34 };
static functions ours;
static functions *theirs;

static void hold(void) {
    while (access(getenv("HOLD_FILE"), F_OK) == 0)
        usleep(10000);
}

static rv encrypt(unsigned long s, void *in, unsigned long n, void *out, void *m) {
    hold();
    return ((with_data)theirs->call[ENCRYPT])(s, in, n, out, m);
}

static rv decrypt(unsigned long s, void *in, unsigned long n, void *out, void *m) {
    hold();
    return ((with_data)theirs->call[DECRYPT])(s, in, n, out, m);
}

rv C_GetFunctionList(functions **list) {
    void *library = dlopen(getenv("HOLD_MODULE"), RTLD_NOW);
    rv (*get)(functions **) = (rv(*)(functions **))dlsym(library, "C_GetFunctionList");
    rv result = get(&theirs);
    memcpy(&ours, theirs, sizeof ours);
    ours.call[ENCRYPT] = (void *)encrypt;
    ours.call[DECRYPT] = (void *)decrypt;
    *list = &ours;
    return result;
}
