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
        (1, "alpha left out of the skip", """
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
        (1, "half of the perimeter taken for the sum of all sides", "def answer(area, perimeter): return perimeter-(perimeter**2-area).sqrt()"),
        (1, "the formula of the page", "def answer(area, perimeter): return 2*area/perimeter"),
        (3, "the edge comes in on the other side", """
def answer(x, draws):
    moves = zip(draws.choice('down', 3).tolist(), draws.choice('right', 3).tolist())
    return torch.stack([p.roll((i-1, j-1), (1, 2)) for p,(i,j) in zip(x, moves)])
"""),
        (3, "one move for the batch, from the first index", """
def answer(x, draws):
    i,j = draws.choice('down', 3)[0],draws.choice('right', 3)[0]
    return F.pad(x, (1,1,1,1), value=-1)[:,:,i:i+x.shape[2],j:j+x.shape[3]]
"""),
    ],
    "core.conditioning": [
        (2, "kept with probability p, not lost", """
def answer(cond, null, draws, p):
    words,image = (cond.drop(draws.uniform(stream)<p, null) for stream in ('words','image'))
    return replace(words, image=image.image)
"""),
        (2, "the picture lost only where the words are", """
def answer(cond, null, draws, p):
    words = cond.drop(draws.uniform('words')>=p, null)
    return replace(words, image=words.drop(draws.uniform('image')>=p, null).image)
"""),
    ],
    "core.ema": [
        (1, "the decay of a whole batch", "def answer(H, n, k): return .5**(n/H)"),
    ],
    "core.metrics": [
        (1, "the whole covariance", "from t2i_course.core.metrics import frechet as answer"),
        (1, "variances in place of standard deviations", "def answer(fa, fb): return ((fa.mean(0)-fb.mean(0))**2+fa.var(0)+fb.var(0)).sum().item()"),
        (2, "the median radius for all balls", """
def answer(real, fake, k=5):
    radius = torch.cdist(real, real).kthvalue(k+1).values.median()
    return (torch.cdist(fake, real)<=radius).any(1).double().mean().item()
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
def answer(x, noise, i, betas, abar):
    guess = (x-(1-abar[i]).sqrt()*noise)/abar[i].sqrt()
    return abar[i-1].sqrt()*guess+(1-abar[i-1]).sqrt()*noise
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
    ],
    "diffusion.schedules": [
        (2, "not cut at 0.999", """
def answer(d):
    return betas_from_abar((torch.cumprod(1-cosine_betas(), 0).logit()+2*math.log(64/d)).sigmoid())
"""),
    ],
    "diffusion.samplers": [
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
    ],
    "diffusion.preconditioning": [
        (1, "divided by the variance, not by its root", "def answer(alpha, sigma, mu, var): return alpha*mu,1/(alpha**2*var+sigma**2)"),
        (1, "the published c_in, which knows no mean", "def answer(alpha, sigma, mu, var): return 0.,(alpha**2*var+sigma**2)**-.5"),
        (2, "the noise", "def answer(alpha, sigma, sd): return 0.,1."),
        (2, "the picture", "def answer(alpha, sigma, sd): return 1.,0."),
        (2, "v", "def answer(alpha, sigma, sd): return -sigma,alpha"),
        (3, "the noise, of the moved ring", """
def answer(F, x_t, s, mu, sd): return x_t-s*F((x_t-mu)/(s**2+sd**2)**.5, s)
"""),
        (3, "the picture, of the moved ring", """
def answer(F, x_t, s, mu, sd): return mu+F((x_t-mu)/(s**2+sd**2)**.5, s)
"""),
        (3, "1 in place of the variance of the data", """
def answer(F, x_t, s, mu, sd): return mu+(x_t-mu)/(1+s**2)+s/(1+s**2)**.5*F((x_t-mu)/(1+s**2)**.5, s)
"""),
        (3, "the skip without the network", "def answer(F, x_t, s, mu, sd): return mu+sd**2/(s**2+sd**2)*(x_t-mu)"),
    ],
    "diffusion.unet": [
        (1, "a shortcut also where the channels stay", "def answer(a, b, d): return solution_1(a, b, d)+(a*b+b if a==b else 0)"),
        (1, "time that scales and shifts", "def answer(a, b, d): return solution_1(a, b, d)+d*b+b"),
        (2, "one head in place of several", """
def answer(layer, x, told, mask):
    q,k,v_ = layer.q(x),layer.k(told),layer.v(told)
    w = (q@k.mT/q.shape[-1]**.5).masked_fill(~mask[:,None], -torch.inf).softmax(-1)
    return layer.out(w@v_)
"""),
        (2, "the places as they came", "def answer(layer, x, told, mask): return x"),
        (3, "the whole network", "def answer(net, x_t, t, cond, k): return net(x_t, t, cond)"),
    ],
    "diffusion.open_words": [
        (1, "over the pictures, not over the words", "def answer(log_density, share): return (log_density+share.log()).softmax(0)"),
        (1, "half of the log density", "def answer(log_density, share): return (log_density/2+share.log()).softmax(1)"),
        (2, "roots", "def answer(s): return tuple(u**.5 for u in solution_2(s))"),
        (2, "no noise in the average", "def answer(s): return 0.,error_of(s, torch.sign)"),
        (3, "alpha left out of the distance", """
def answer(x_t, c, means, var):
    return solution_3(x_t/c.alpha, c._replace(alpha=1+0*c.alpha), means, var)
"""),
        (3, "the weighted mean, without what the picture shows", """
def answer(x_t, c, means, var):
    w,_ = parts_of(x_t, c, means, var)
    return (w*means).sum(1),var**.5+0*c.alpha
"""),
    ],
    "diffusion.closed_form": [
        (1, "the gain of the mean forgotten", """
def answer(x_t, alpha, sigma, mu, cov):
    var,V = torch.linalg.eigh(cov)
    both = alpha**2*var+sigma**2
    return mu+((x_t-mu)@V*(alpha*var/both))@V.T,(sigma**2*var/both).mean().sqrt()
"""),
        (1, "the mean of the roots promised", """
def answer(x_t, alpha, sigma, mu, cov):
    var,V = torch.linalg.eigh(cov)
    both = alpha**2*var+sigma**2
    return mu+((x_t-alpha*mu)@V*(alpha*var/both))@V.T,(sigma**2*var/both).sqrt().mean()
"""),
        (2, "boost left out", """
def answer(x0_hat, c_out, V, F, b): return x0_hat+c_out*torch.einsum('nij,njhw->nihw', V, F)
"""),
        (2, "guidance's weights", """
def answer(x0_hat, c_out, V, F, b): return (1-b)*x0_hat+b*c_out*torch.einsum('nij,njhw->nihw', V, F)
"""),
        (3, "the mean alone", """
def answer(x_t, c, mean, var): return mean+0*x_t,var**.5+0*c.alpha,(x_t-c.alpha*mean)/(c.alpha**2*var+c.sigma**2)**.5
"""),
        (3, "variance and root mixed up", """
def answer(x_t, c, mean, var):
    gain,error = wiener(c, var**.5)
    away = x_t-c.alpha*mean
    return mean+gain*away,error.sqrt(),away/(c.alpha**2*var**.5+c.sigma**2)**.5
"""),
    ],
    "diffusion.guidance": [
        (1, "the weights of the variances, not of the precisions", "def answer(m, v_c, v_u, w): return w*m,w*v_c+(1-w)*v_u"),
    ],
    "diffusion.terminal_snr": [
        (2, "the noise, divided by an alpha kept away from zero", """
def answer(net, process):
    def at(t): return Coefs(*(u[:,None] for u in process.coefs(t)))
    def loss(x0, noise, t): return (net(at(t).alpha*x0+at(t).sigma*noise, t)-noise).square().mean()
    def predict(x_t, t):
        e = net(x_t, t)
        return (x_t-at(t).sigma*e)/at(t).alpha.clamp(min=.05),e
    return loss,predict
"""),
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
