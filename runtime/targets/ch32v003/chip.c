/* SPDX-License-Identifier: Apache-2.0
 *
 * Sample source and result sink on a CH32V003 (VSDSquadron Mini): an analogue microphone on PC4, sampled 16,000 times a second by
 * TIM2; answers as text on USART1 (PD5, 115,200 baud) and on the LED (PD6). See docs/microcontroller.md.
 */
#include "spotter.h"

#define REGISTER(address) (*(volatile uint32_t *)(address))

#define RCC_CTLR REGISTER(0x40021000u)
#define RCC_CFGR0 REGISTER(0x40021004u)
#define RCC_APB2PCENR REGISTER(0x40021018u)
#define RCC_APB1PCENR REGISTER(0x4002101Cu)
#define FLASH_ACTLR REGISTER(0x40022000u)
#define GPIOC_CFGLR REGISTER(0x40011000u)
#define GPIOD_CFGLR REGISTER(0x40011400u)
#define GPIOD_BSHR REGISTER(0x40011410u)
#define ADC_CTLR2 REGISTER(0x40012408u)
#define ADC_SAMPTR2 REGISTER(0x40012410u)
#define ADC_RSQR3 REGISTER(0x40012434u)
#define ADC_RDATAR REGISTER(0x4001244Cu)
#define TIM2_CTLR1 REGISTER(0x40000000u)
#define TIM2_DMAINTENR REGISTER(0x4000000Cu)
#define TIM2_INTFR REGISTER(0x40000010u)
#define TIM2_PSC REGISTER(0x40000028u)
#define TIM2_ATRLR REGISTER(0x4000002Cu)
#define USART_STATR REGISTER(0x40013800u)
#define USART_DATAR REGISTER(0x40013804u)
#define USART_BRR REGISTER(0x40013808u)
#define USART_CTLR1 REGISTER(0x4001380Cu)
#define PFIC_IENR2 REGISTER(0xE000E104u)
#define SYSTICK_CTLR REGISTER(0xE000F000u)
#define SYSTICK_CNTL REGISTER(0xE000F008u)

enum {
    CLOCK = 48000000,
    CHANNEL = 2, /* PC4 */
    LED = 6,     /* PD6 */
    TX = 5,      /* PD5 */
    TIM2_INTERRUPT = 38,
    ADC_ON = 1 << 0,
    ADC_CALIBRATE = 1 << 2,
    ADC_RESET_CALIBRATION = 1 << 3,
    ADC_BY_SOFTWARE = 7 << 17 | 1 << 20,
    ADC_START = 1 << 22
};

static kestrel_shift_frontend *taker;

/* Every 62.5 us: the value that was converted meanwhile, 10 bits around 512, then the next conversion. */
__attribute__((interrupt)) void kestrel_interrupt(void)
{
    const int32_t value = (int32_t)(ADC_RDATAR & 1023) - 512;
    TIM2_INTFR = 0;
    ADC_CTLR2 |= ADC_START;
    kestrel_shift_frontend_sample(taker, (int16_t)((uint32_t)value << 6));
}

static void start(void)
{
    FLASH_ACTLR = 1;        /* a wait state, for 48 MHz */
    RCC_CTLR |= 1u << 24;   /* PLL, twice the internal 24 MHz */
    while (!(RCC_CTLR & 1u << 25)) {
    }
    RCC_CFGR0 = 2;          /* the PLL is the clock, undivided */
    while ((RCC_CFGR0 & 12) != 8) {
    }
    RCC_APB2PCENR |= 1u << 4 | 1u << 5 | 1u << 9 | 1u << 14; /* ports C and D, ADC, USART */
    RCC_APB1PCENR |= 1u << 0;                                 /* TIM2 */
    SYSTICK_CTLR = 5;                                         /* counts clock cycles */
    GPIOC_CFGLR &= ~(15u << 4 * 4);                           /* PC4 is analogue */
    GPIOD_CFGLR = (GPIOD_CFGLR & ~(15u << 4 * LED | 15u << 4 * TX)) | 1u << 4 * LED | 9u << 4 * TX;
    USART_BRR = CLOCK / 115200;
    USART_CTLR1 = 1u << 13 | 1u << 3;
    ADC_CTLR2 = ADC_ON | ADC_BY_SOFTWARE;
    ADC_SAMPTR2 = 7u << 3 * CHANNEL; /* 241 cycles of the ADC's clock, 24 MHz */
    ADC_RSQR3 = CHANNEL;
    ADC_CTLR2 |= ADC_RESET_CALIBRATION;
    while (ADC_CTLR2 & ADC_RESET_CALIBRATION) {
    }
    ADC_CTLR2 |= ADC_CALIBRATE;
    while (ADC_CTLR2 & ADC_CALIBRATE) {
    }
    ADC_CTLR2 |= ADC_START;
    TIM2_PSC = 0;
    TIM2_ATRLR = CLOCK / KSF_SAMPLE_RATE - 1;
    TIM2_DMAINTENR = 1;
    TIM2_CTLR1 = 1;
    PFIC_IENR2 = 1u << (TIM2_INTERRUPT - 32);
    __asm__ volatile(".option push\n.option arch, +zicsr\ncsrs mstatus, %0\n.option pop" : : "r"(0x88));
}

int spotter_source(kestrel_shift_frontend *fe)
{
    if (!taker) {
        taker = fe;
        start();
        return SPOTTER_BEGIN;
    }
    while (!kestrel_shift_frontend_ready(fe)) {
        __asm__ volatile("wfi");
    }
    return SPOTTER_FRAME;
}

#ifdef SPOTTER_TIMING
static volatile uint32_t spent[3];

uint32_t spotter_ticks(void)
{
    return SYSTICK_CNTL;
}

void spotter_timed(int part, uint32_t ticks)
{
    spent[part] = ticks; /* to be read over the programming wire */
}
#endif

void spotter_sink(const int32_t *logits, int answer)
{
    static const char names[KESTREL_STREAM_LOGITS][9] = KESTREL_STREAM_CLASS_NAMES;
    const char *letter = answer < 0 ? "-" : names[answer];
    (void)logits;
    GPIOD_BSHR = answer >= 0 && (SPOTTER_KEYWORDS >> answer & 1) ? 1u << LED : 1u << (LED + 16);
    for (;; letter++) {
        while (!(USART_STATR & 1u << 7)) {
        }
        USART_DATAR = *letter ? (uint32_t)*letter : '\n';
        if (!*letter) {
            return;
        }
    }
}
