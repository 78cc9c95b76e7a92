"""Wrong answers that a reader may well give, beside those on the pages: the neighbouring method, the published value, half of the formula.

{address of the chapter: [(exercise, what it is, code that defines `answer`)]}; the code sees the names of the page."""

NEIGHBOURS = {
    "start.tour": [
        (1, "an upright lean counts as demanded", """
def answer(caption):
    p = 1 if 'leaning' in caption else 1/3
    for k in Painted().demands(caption): p /= len(ATTRIBUTES[k])
    return p
"""),
        (2, "the median for every loss", "def answer(pictures, loss): return pictures.median(0).values"),
        (2, "one picture alone", "def answer(pictures, loss): return solution_2(pictures[:1], loss)"),
        (3, "near enough to the step before", """
def answer(run, captions):
    pictures = {n:draw(run, captions, steps=n, seed=0) for n in (1,2,4,8,16,32)}
    far = lambda n: (pictures[n]-pictures[n//2]).abs().mean()
    return next((n for n in (4,8,16,32) if far(n)<=.2*far(2)), 32)
"""),
    ],
    "start.notation": [
        (1, "EDM's published numbers, alpha left out of the skip", """
def answer(alpha, sigma, c_skip, c_out): return (1-c_skip)/c_out,-c_skip*sigma/(alpha*c_out)
"""),
        (2, "the derivatives change places", """
class answer(Reversed):
    def coefs(self, t):
        c = self.process.coefs(1-t)
        return Coefs(c.alpha, c.sigma, c.dsigma, c.dalpha)
"""),
        (3, "the velocity of the other clock", "def answer(*args): return -solution_3(*args)"),
        (3, "the velocity of the network's own process", """
def answer(net, process, target, x, t):
    ours = LinearPath().coefs(t)
    when = time_at(process, log_snr(ours))
    c = process.coefs(when)
    x0_hat,eps_hat = solve(c, *target(c), x*brightness(c)/brightness(ours), net(x*brightness(c)/brightness(ours), when))
    return c.dalpha*x0_hat+c.dsigma*eps_hat
"""),
    ],
    "core.data": [
        (1, "one normal number, not two", "def answer(u): return 2**.5*torch.erfinv(1-u)"),
    ],
    "core.conditioning": [
        (2, "no mask", "def answer(q, k, v, mask): return (q@k.transpose(1, 2)/q.shape[-1]**.5).softmax(-1)@v"),
        (2, "the mask the wrong way round", """
def answer(q, k, v, mask): return F.scaled_dot_product_attention(q, k, v, attn_mask=~mask[:,None]).nan_to_num()
"""),
    ],
    "core.training": [
        (1, "the middle of the whole run", "def answer(w): return .5+w"),
        (2, "the mean of each piece, weighted by the pieces", """
def answer(net, x, y, k):
    net.zero_grad()
    for a,b in zip(x.chunk(k), y.chunk(k)): (F.mse_loss(net(a), b)*k).backward()
"""),
        (3, "Adam with an L2 penalty", """
def answer(w, g, m, s, k, lr, beta1, beta2, decay):
    g = g+decay*w
    m.lerp_(g, 1-beta1)
    s.lerp_(g**2, 1-beta2)
    w.sub_(lr*m/(1-beta1**k)/((s/(1-beta2**k)).sqrt()+1e-8))
"""),
        (3, "no decay", """
def answer(w, g, m, s, k, lr, beta1, beta2, decay):
    m.lerp_(g, 1-beta1)
    s.lerp_(g**2, 1-beta2)
    w.sub_(lr*m/(1-beta1**k)/((s/(1-beta2**k)).sqrt()+1e-8))
"""),
        (3, "the sign of the gradient, as Adam's first step", """
def answer(w, g, m, s, k, lr, beta1, beta2, decay): w.mul_(1-lr*decay).sub_(lr*g.sign())
"""),
    ],
    "core.ema": [
        (1, "the decay of a whole batch", "def answer(H, n, k): return .5**(n/H)"),
        (1, "a share of the half-life in steps", "def answer(H, n, k): return 1-k*n/H/2"),
        (2, "an exponential average, as on the page", """
def answer(mean, weights, k):
    for m,w in zip(mean, weights): m.lerp_(w, .1)
"""),
        (3, "the setting of the recipes", "def answer(images): return 5e5,.05"),
        (3, "a good one for one length", "def answer(images): return 1280,math.inf"),
    ],
    "core.metrics": [
        (1, "the whole covariance", "def answer(fa, fb): return frechet(fa, fb)"),
        (1, "variances in place of standard deviations", "def answer(fa, fb): return ((fa.mean(0)-fb.mean(0))**2+fa.var(0)+fb.var(0)).sum().item()"),
        (2, "the median radius for all balls", """
def answer(real, fake, k=5):
    radius = torch.cdist(real, real).kthvalue(k+1).values.median()
    return (torch.cdist(fake, real)<=4*radius).any(1).double().mean().item()
"""),
        (3, "upside down, not dark", "def answer(x, draws): return augment(x, draws).flip(2)"),
        (3, "other random numbers at every call", """
def answer(x, draws): return augment(x, draws)*torch.where(torch.rand(len(x))<.5, -1., 1.)[:,None,None,None]
"""),
    ],
    "core.plots": [
        (1, "the spread, not the error of the mean", "def answer(s1, s2, n): return (s2/n-(s1/n)**2)**.5"),
        (2, "the highest loss in either network", "def answer(ts, good, ts2, theirs): return ts2[theirs.argmax()].item()"),
        (3, "the sum over the pixels", "def answer(net, x0, eps, t): return (net((1-t)*x0+t*eps, t)-eps).square().flatten(1).sum(1)"),
        (3, "one number for the batch", "def answer(net, x0, eps, t): return F.mse_loss(net((1-t)*x0+t*eps, t), eps)"),
        (3, "a path that keeps the variance", """
def answer(net, x0, eps, t): return (net((1-t**2).sqrt()*x0+t*eps, t)-eps).square().flatten(1).mean(1)
"""),
    ],
    "gan.adversarial": [
        (2, "half of the gradient is cut off", "def answer(disc, x, u, h): return ((disc(x+h*u)-disc(x).detach())/h).square()"),
        (2, "x is ignored", "def answer(disc, x, u, h): return ((disc(h*u)-disc(0*u))/h).square()"),
        (2, "second derivatives, which are forbidden", """
def answer(disc, x, u, h):
    x = x.detach().requires_grad_()
    slope, = torch.autograd.grad(disc(x).sum(), x, create_graph=True)
    return slope.square().sum(1)
"""),
    ],
    "gan.text_gan": [
        (2, "every fourth number is a head", """
def answer(q, k, v, mask, heads):
    parts = [u.unflatten(2, (-1, heads)).permute(0,3,1,2) for u in (q, k, v)]
    return F.scaled_dot_product_attention(*parts, attn_mask=mask[:,None,None]).transpose(1, 2).flatten(2)
"""),
    ],
    "codec.vae": [
        (2, "free bits for all channels together", """
def answer(mean, logvar, free): return kl_to_normal(mean, logvar).mean((0,2,3)).sum().clamp_min(free)
"""),
    ],
    "codec.dvae": [
        (2, "straight through without the noise", """
def answer(logits, noise, tau):
    y = (logits/tau).softmax(1)
    return y+(F.one_hot(y.argmax(1), y.shape[1])-y).detach()
"""),
    ],
    "diffusion.ddpm": [
        (1, "DDIM's step in place of the ancestral one", """
def answer(x, v, i, betas, abar):
    guess = abar[i].sqrt()*x-(1-abar[i]).sqrt()*v
    return abar[i-1].sqrt()*guess+(1-abar[i-1]).sqrt()*(abar[i].sqrt()*v+(1-abar[i]).sqrt()*x)
"""),
        (2, "the noise as the target", """
def answer(net, pics, noise, abar, t):
    alpha,sigma = (u.view(-1, 1, 1, 1) for u in (abar.sqrt(), (1-abar).sqrt()))
    return F.mse_loss(net(alpha*pics+sigma*noise, t), noise)
"""),
        (2, "another time for the network", """
def answer(net, pics, noise, abar, t):
    alpha,sigma = (u.view(-1, 1, 1, 1) for u in (abar.sqrt(), (1-abar).sqrt()))
    return F.mse_loss(net(alpha*pics+sigma*noise, 1-t), alpha*noise-sigma*pics)
"""),
        (3, "the clean point as the target", """
def answer(net, x0, label, i, eps):
    x_t = abar[i].sqrt()*x0+(1-abar[i]).sqrt()*eps
    told = torch.where(torch.rand(len(label))<.1, 2, label)
    return F.mse_loss(net(x_t, i, told), x0)
"""),
        (3, "another point's label in place of none", """
def answer(net, x0, label, i, eps):
    x_t = abar[i].sqrt()*x0+(1-abar[i]).sqrt()*eps
    told = torch.where(torch.rand(len(label))<.1, label.roll(1), label)
    return F.mse_loss(net(x_t, i, told), eps)
"""),
        (3, "half of the labels dropped", """
def answer(net, x0, label, i, eps):
    x_t = abar[i].sqrt()*x0+(1-abar[i]).sqrt()*eps
    told = torch.where(torch.rand(len(label))<.5, 2, label)
    return F.mse_loss(net(x_t, i, told), eps)
"""),
    ],
    "diffusion.likelihood": [
        (1, "the weight of the simple loss", """
def answer(before, now): return 1.
"""),
        (1, "the signal-to-noise ratio itself", """
def answer(before, now): return now/(1-now)/2
"""),
        (2, "sure of the cheapest caption", """
def answer(bits, pixels): return torch.nn.functional.one_hot(bits.argmin(1), bits.shape[1]).double()
"""),
        (2, "shares of the bits", """
def answer(bits, pixels): return (1/bits)/(1/bits).sum(1, keepdim=True)
"""),
        (3, "the distance of the logarithms in place of the bound", """
def answer(share, posterior, beta, gap):
    log_var = share*beta.log()+(1-share)*posterior.log()
    return (log_var-(posterior+gap).log()).square().sum()/2
"""),
        (3, "the posterior's variance, whatever the shares", """
def answer(share, posterior, beta, gap): return (gap/posterior).sum()/2
"""),
    ],
    "diffusion.schedules": [
        (2, "not cut at 0.999", """
def answer(d):
    return betas_from_abar((torch.cumprod(1-cosine_betas(), 0).logit()+2*math.log(64/d)).sigmoid())
"""),
    ],
    "diffusion.samplers": [
        (1, "DDIM with the guesses of the noise and the picture exchanged", """
def answer(x_t, v_hat, phi_t, phi_s):
    x0,noise = math.cos(phi_t)*x_t-math.sin(phi_t)*v_hat,math.sin(phi_t)*x_t+math.cos(phi_t)*v_hat
    return math.sin(phi_s)*x0+math.cos(phi_s)*noise
"""),
        (2, "Heun in place of the midpoint", """
def answer(slope, y, l, l_next):
    a = slope(y, l)
    return y+(l_next-l)*(a+slope(y+(l_next-l)*a, l_next))/2
"""),
        (2, "Euler that looks twice", """
def answer(slope, y, l, l_next):
    slope(y, l)
    return y+(l_next-l)*slope(y, l)
"""),
        (2, "a look in the middle from which only half a step is taken", """
def answer(slope, y, l, l_next):
    half = (l+l_next)/2
    there = y+(half-l)*slope(y, l)
    return y+(half-l)*slope(there, half)
"""),
        (3, "the published spacing", "def answer(process, n): return rho_times(process, n, 7., .002)"),
        (3, "leading steps", "def answer(process, n): return leading(process, n)"),
        (3, "more steps than were asked for", "def answer(process, n): return rho_times(process, 4*n, math.inf, .1)"),
    ],
    "diffusion.sde": [
        (1, "the variance of EDM's process", "def answer(alpha, sigma, dalpha, dsigma): return dalpha/alpha,2*sigma*dsigma"),
        (1, "the pair the wrong way round", """
def answer(alpha, sigma, dalpha, dsigma): return 2*sigma*dsigma-2*dalpha/alpha*sigma**2,dalpha/alpha
"""),
        (2, "the ancestral step", """
def answer(slope, y, l, l_next, gamma, z):
    k = l_next/l
    e = slope(y, l)
    return y-l*e+l_next*(k*e+(1-k*k)**.5*z)
"""),
        (2, "down to another level", """
def answer(slope, y, l, l_next, gamma, z):
    high = l*(1+gamma)
    y = y+(high**2-l**2)**.5*z
    return y+(l_next-l)*slope(y, high)
"""),
        (3, "fresh noise at the highest levels only", "def answer(l): return 1. if l>8 else 0."),
        (3, "more than all of the noise", "def answer(l): return 2. if l>.3 else 0."),
    ],
    "diffusion.inversion": [
        (1, "a loss of first order", "def answer(s, low, high): return 1-(high-low)*high/(s*s+high*high)"),
        (1, "both factors, the look of the step down at the low level", """
def answer(s, low, high):
    q,r = (high-low)*high/(s*s+high*high),(high-low)*low/(s*s+low*low)
    return (1+q)*(1-r)
"""),
        (2, "a fixed-point round of each copy", """
def answer(slope, a, b, low, high):
    there = a+(high-low)*slope(a, high)
    return a+(high-low)*slope(there, high),b+(high-low)*slope(b, high)
"""),
        (3, "the convention of Ho and Salimans, one less", """
def answer(own, new, w): return lambda x_t,t: tuple(v+w*(v-u) for u,v in zip(own(x_t, t), new(x_t, t)))
"""),
        (3, "usual guidance, from the empty caption", """
def answer(own, new, w):
    empty = guided(den, told, 0.)
    return lambda x_t,t: tuple(u+w*(v-u) for u,v in zip(empty(x_t, t), new(x_t, t)))
"""),
    ],
    "diffusion.guidance": [
        (1, "the weights of the variances, not of the precisions", "def answer(m, v_c, v_u, w): return w*m,w*v_c+(1-w)*v_u"),
        (2, "keeps with probability p", "def answer(net, x0, side, half, p): return solution_2(net, x0, side, half, 1-p)"),
        (2, "drops the side only", """
def answer(net, x0, side, half, p): return squared_error(net, x0, torch.where(coin(x0, p), 2, side), half)
"""),
        (2, "the noise in place of the clean point", """
def answer(net, x0, side, half, p):
    t = .05+.55*torch.rand(len(x0))
    co,noise = vp.coefs(t),torch.randn_like(x0)
    side,half = (torch.where(coin(x0, p), 2, k) for k in (side, half))
    return (net(co.alpha[:,None]*x0+co.sigma[:,None]*noise, t, side, half)-noise).square().mean()
"""),
        (3, "one step too many", "def answer(w, least): return solution_3(w, least)+.05"),
    ],
    "diffusion.terminal_snr": [
        (1, "the noise of one number, not of the mean", "def answer(alpha, sigma, gap, n): return normal.cdf(torch.tensor(alpha*gap/sigma)).item()"),
        (2, "trained for v, read as x0", """
def answer(net, process):
    return repair_with(v)(net, process)[0],repair_with(x0)(net, process)[1]
"""),
        (2, "v with the other sign", """
def answer(net, process): return repair_with(lambda c: tuple(-u for u in v(c)))(net, process)
"""),
        (3, "gray as far as the outer heaps", "def answer(alpha): return 2*solution_3(alpha)"),
    ],
    "flow.flow_matching": [
        (2, "the midpoint in place of Heun", """
def answer(v, x, ts):
    for t,s in zip(ts[:-1], ts[1:]):
        a = v(x, t.expand(len(x)))
        x = x-(t-s)*v(x-(t-s)/2*a, ((t+s)/2).expand(len(x)))
    return x
"""),
    ],
    "ar.pixelcnn": [
        (3, "a constant that suits this model", "def answer(surprise): return .6"),
    ],
    "ar.dalle": [
        (2, "the best two in place of the nucleus", """
def answer(logits, p): return logits.masked_fill(logits<logits.topk(2, 1).values[:,-1:], -math.inf)
"""),
    ],
    "scale.mixed_precision": [
        (3, "the usual start of a loss scaler", "def answer(grads): return 16"),
    ],
    "scale.fsdp": [
        (2, "FSDP as cheap as DDP", "def answer(params, size, how): return 2*4*params*(size-1)/size"),
    ],
    "scale.pipeline": [
        (3, "a half-life of 20 steps", "def answer(): return .5**(1/20)"),
    ],
}
